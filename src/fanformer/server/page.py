"""The playground: a page of a few files, whose only door to the models is the API that everyone has."""

import hashlib
import mimetypes
from importlib import resources

from fastapi import FastAPI
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from fanformer.server.refusal import RefusalError

ROOT, FILES = "/", "/page/"
_FIRST = "index.html"
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "permissions-policy": "camera=(), geolocation=(), microphone=(self)",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",  # asked for again, and not sent where it is as it was
}


def is_page(path: str) -> bool:
    """Return whether a path is of the page, which is nobody's secret, rather than of the API."""
    return path == ROOT or path.startswith(FILES)


def add_page(app: FastAPI) -> None:
    """Let an application answer with the page, whose files are read once."""
    folder = resources.files("fanformer.server").joinpath("playground")
    files = {entry.name: entry.read_bytes() for entry in folder.iterdir() if entry.is_file()}
    tags = {name: f'"{hashlib.sha256(content).hexdigest()[:16]}"' for name, content in files.items()}

    def answer(request: HTTPRequest, name: str) -> Response:
        if name not in files:
            raise RefusalError(404, "there is no such path.")
        headers = {**_HEADERS, "etag": tags[name]}
        if request.headers.get("if-none-match") == tags[name]:
            return Response(status_code=304, headers=headers)
        kind = "text/javascript" if name.endswith(".js") else mimetypes.guess_type(name)[0]
        return Response(files[name], headers=headers, media_type=kind)

    @app.get(ROOT, include_in_schema=False)
    async def first(request: HTTPRequest) -> Response:
        return answer(request, _FIRST)

    @app.get(FILES + "{name}", include_in_schema=False)
    async def file(request: HTTPRequest, name: str) -> Response:
        return answer(request, name)
