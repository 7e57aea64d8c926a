"""A hub on 127.0.0.1 with the paths and answers of huggingface.co, repositories in memory, and faults on order.

What it answers is what `huggingface_hub`, `datasets` and `transformers` ask, found by reading `LocalHub.requests`:
repository information, trees, files (large ones by a redirect to another host, as the hub's storage is), and uploads by
LFS. Xet storage is left out: clients of this server set HF_HUB_DISABLE_XET=1.
"""

import base64
import hashlib
import http.server
import importlib.util
import json
import re
import socket
import threading
import time
import urllib.parse
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import yaml

LARGE_BYTES = 4096
"""Files from this size on, and all whose content is not text, are stored apart from git, as the hub does it."""


@dataclass(frozen=True)
class Request:
    """One line of the request log."""

    method: str
    path: str
    range: str | None


@dataclass
class Fault:
    """What happens to the next requests whose method and path contain `match`."""

    match: str
    times: int
    after: int = 0
    """Matching requests that are answered well before."""
    status: int | None = None
    drop_at_byte: int | None = None
    """Byte of the body at which the connection ends."""
    seconds: float = 0.0
    """Time that passes before the answer."""


@dataclass
class Repository:
    """Files by path, for every commit."""

    kind: str
    name: str
    is_private: bool = False
    is_gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    head: str = ""

    def commit(self, files):
        """Make a new head with exactly these files."""
        tree = "".join(f"{path}\0{git_id(content)}\n" for path, content in sorted(files.items()))
        self.head = hashlib.sha1(f"{self.head}{self.kind}{self.name}{tree}".encode()).hexdigest()
        self.commits[self.head] = dict(files)

    @property
    def files(self):
        """The files of the newest commit."""
        return self.commits[self.head]


def git_id(content):
    """Return the id that git gives to a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(content):
    """Return whether the hub would keep the file in its large file storage."""
    if len(content) >= LARGE_BYTES:
        return True
    try:
        return "\0" in content.decode()
    except UnicodeDecodeError:
        return True


def entity_tag(content):
    """Return the ETag of a file: SHA-256 of a large one, git's id of another."""
    return hashlib.sha256(content).hexdigest() if is_large(content) else git_id(content)


def card_data(files):
    """Return the metadata block of the README, or None."""
    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", files.get("README.md", b"").decode(), re.DOTALL)
    return yaml.safe_load(match[1]) if match else None


def point_at(monkeypatch, endpoint):
    """Make this process use the hub at `endpoint`; the packages have read their settings when they were imported."""
    from huggingface_hub import close_session, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    file_url = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", file_url)
    if importlib.util.find_spec("datasets"):
        from datasets import config

        monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(config, "HF_ENDPOINT", endpoint)
        dataset_url = endpoint + "/datasets/{repo_id}/resolve/{revision}/{path}"
        monkeypatch.setattr(config, "HUB_DATASETS_URL", dataset_url)
        monkeypatch.setattr(config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
    close_session()


class LocalHub:
    """The server; `with LocalHub() as hub` starts it and stops it."""

    TOKEN = "hf_local"
    """The one token that it accepts, of USER."""
    USER = "user"

    def __init__(self):
        self.repositories, self.storage, self.requests, self.faults = {}, {}, [], []
        self.lock = threading.RLock()
        self.has_large_storage = True
        """Whether large files are to be sent to the storage; else all come with the commit."""
        self._connections, self._server, self.port = set(), None, 0

    def add(self, kind, name, source, *, private=False, gated=False):
        """Create a repository of kind "models" or "datasets" from a folder or a dictionary of bytes."""
        repository = Repository(kind, name, private, gated)
        if isinstance(source, Path):
            files = sorted(path for path in source.rglob("*") if path.is_file())
            source = {path.relative_to(source).as_posix(): path.read_bytes() for path in files}
        repository.commit(source)
        self.repositories[kind, name] = repository
        return repository

    def fail(self, match, *, times=1, after=0, status=None, drop_at_byte=None, seconds=0.0):
        """Spoil the next `times` requests that contain `match`, such as "GET /datasets/a/b/resolve"."""
        self.faults.append(Fault(match, times, after, status, drop_at_byte, seconds))

    def next_fault(self, request):
        """Return the fault that strikes this request, or None, and count it."""
        with self.lock:
            for fault in self.faults:
                if fault.match in f"{request.method} {request.path}" and fault.times:
                    if fault.after:
                        fault.after -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def asked(self, text):
        """Return the logged requests whose method and path contain `text`."""
        return [request for request in self.requests if text in f"{request.method} {request.path}"]

    @property
    def url(self):
        """The value for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.port}"

    def environment(self, home, token=None):
        """Return the environment variables of a process that uses this hub."""
        variables = {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        # counted on another host, which a test cannot reach
        variables |= {"HF_UPDATE_DOWNLOAD_COUNTS": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return variables | ({"HF_TOKEN": token} if token else {})

    def start(self):
        """Listen, on the same port as before where it has run before."""
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), _Handler)
        self._server.daemon_threads, self._server.hub = True, self
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self):
        """Go away: refuse new connections and end those there are."""
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop()


class _Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status, message, code=None):
        super().__init__(message)
        self.status, self.code = status, code


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # head and body in one packet and at once, else every answer waits for an acknowledgement
    wbufsize, disable_nagle_algorithm = -1, True
    ROUTES = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/(models)/(.+)/preupload/([^/]+)", "preupload"),
        ("POST", r"/api/(models)/(.+)/commit/([^/]+)", "commit"),
        ("POST", r"/api/(models|datasets)/(.+)/paths-info/([^/]+)", "paths_info"),
        ("GET", r"/api/(models|datasets)/(.+)/tree/([^/]+)(?:/(.+))?", "tree"),
        ("GET", r"/api/(models|datasets)/(.+)/revision/([^/]+)", "information"),
        ("GET", r"/api/(models|datasets)/(.+)/auth-check", "check_access"),
        ("GET", r"/api/(models|datasets)/(.+)", "information"),
        ("POST", r"/(.+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/storage/([0-9a-f]{64})", "store"),
        ("GET", r"/storage/([0-9a-f]{64})", "load"),
        ("HEAD", r"/storage/([0-9a-f]{64})", "load"),
        ("GET", r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
        ("HEAD", r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
        ("HEAD", r"/?", "front_page"),
    )

    def setup(self):
        super().setup()
        self.hub = self.server.hub
        self.hub._connections.add(self.connection)

    def finish(self):
        self.hub._connections.discard(self.connection)
        with suppress(OSError):
            super().finish()

    def handle(self):
        with suppress(ConnectionError):  # a client that was killed
            super().handle()

    def _answer(self):
        url = urllib.parse.urlsplit(self.path)
        path, self.query = url.path, urllib.parse.parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = Request(self.command, urllib.parse.unquote(path), self.headers.get("Range"))
        self.hub.requests.append(request)
        fault = self.hub.next_fault(request)
        self.drop_at_byte = fault.drop_at_byte if fault else None
        if fault:
            time.sleep(fault.seconds)
        try:
            if fault and fault.status:
                raise _Refusal(fault.status, "a fault on order")
            for method, pattern, name in self.ROUTES:
                match = re.fullmatch(pattern, path)
                if match and method == self.command:
                    groups = (urllib.parse.unquote(group) if group else group for group in match.groups())
                    getattr(self, "_" + name)(*groups)
                    return
            raise _Refusal(404, f"this hub has no {self.command} {path}")
        except _Refusal as refusal:
            # as the hub: the reason in headers, so that it reaches who asked by HEAD
            reasons = {"X-Error-Message": str(refusal)} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            self._send_json({"error": str(refusal)}, status=refusal.status, headers=reasons)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def log_message(self, *_):
        pass

    def _send(self, content, *, status=200, headers=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(content[: self.drop_at_byte])
        if self.drop_at_byte is not None:
            self.close_connection = True
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

    def _send_json(self, value, *, status=200, headers=None):
        content = json.dumps(value).encode()
        self._send(content, status=status, headers={"Content-Type": "application/json"} | (headers or {}))

    def _send_range(self, content, headers):
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        headers = headers | {"Accept-Ranges": "bytes"}
        if not match:
            self._send(content, headers=headers)
            return
        start, end = int(match[1]), min(int(match[2] or len(content)) + 1, len(content))
        if start >= len(content):
            raise _Refusal(416, "range not satisfiable")
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        self._send(content[start:end], status=206, headers=headers)

    def _has_token(self):
        return self.headers.get("Authorization") == f"Bearer {self.hub.TOKEN}"

    def _require_token(self):
        if not self._has_token():
            raise _Refusal(401, "Invalid credentials in Authorization header")

    def _repository(self, kind, name):
        repository = self.hub.repositories.get((kind, name))
        if repository is None or (repository.is_private and not self._has_token()):
            # the hub does not tell a stranger which of the two it is
            raise _Refusal(404 if self._has_token() else 401, "Repository not found", "RepoNotFound")
        return repository

    def _files(self, kind, name, revision):
        repository = self._repository(kind, name)
        revision = repository.head if revision == "main" else revision
        if revision not in repository.commits:
            raise _Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repository, revision, repository.commits[revision]

    def _front_page(self):
        self._send(b"")

    def _whoami(self):
        self._require_token()
        self._send_json({"type": "user", "name": self.hub.USER, "orgs": [], "auth": {"type": "access_token"}})

    def _information(self, kind, name, revision="main"):
        repository, revision, files = self._files(kind, name, revision)
        self._send_json(
            {
                "id": name,
                "sha": revision,
                "private": repository.is_private,
                "gated": "auto" if repository.is_gated else False,
                "disabled": False,
                "tags": [],
                "cardData": card_data(files) or {},
                "siblings": [{"rfilename": path} for path in sorted(files)],
            }
        )

    def _tree(self, kind, name, revision, folder=None):
        _, _, files = self._files(kind, name, revision)
        prefix = f"{folder}/" if folder else ""
        inside = [path for path in sorted(files) if path.startswith(prefix)]
        if not inside:
            raise _Refusal(404, f"{folder} does not exist", "EntryNotFound")
        is_recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        entries = {}
        for path in inside:
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts)):
                entries.setdefault(prefix + "/".join(parts[:depth]), None)
            entries[path] = files[path]
        self._send_json(
            [
                _entry(path, content)
                for path, content in entries.items()
                if is_recursive or "/" not in path.removeprefix(prefix)
            ]
        )

    def _paths_info(self, kind, name, revision):
        _, _, files = self._files(kind, name, revision)
        if "json" in self.headers.get("Content-Type", ""):
            paths = json.loads(self.body)["paths"]
        else:
            paths = urllib.parse.parse_qs(self.body.decode())["paths"]
        folders = [path for path in paths if any(other.startswith(path + "/") for other in files)]
        self._send_json([_entry(path, files.get(path)) for path in paths if path in files or path in folders])

    def _require_access(self, repository):
        if repository.is_gated and not self._has_token():
            raise _Refusal(401, f"Access to {repository.name} is restricted, you must log in", "GatedRepo")

    def _check_access(self, kind, name):
        self._require_access(self._repository(kind, name))
        self._send_json({})

    def _resolve(self, kind, name, revision, path):
        repository, revision, files = self._files("datasets" if kind else "models", name, revision)
        self._require_access(repository)
        headers = {"X-Repo-Commit": revision}
        if path not in files:
            raise _Refusal(404, "Entry not found", "EntryNotFound")
        content = files[path]
        headers["ETag"] = f'"{entity_tag(content)}"'
        if not is_large(content):
            self._send_range(content, headers)
            return
        # another host, as the hub's storage is: a client may not send its token there
        key = entity_tag(content)
        self.hub.storage[key] = content
        headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": headers["ETag"]}
        self._send(b"", status=302, headers=headers | {"Location": f"http://localhost:{self.hub.port}/storage/{key}"})

    def _load(self, key):
        if key not in self.hub.storage:
            raise _Refusal(404, "Entry not found")
        self._send_range(self.hub.storage[key], {"ETag": f'"{key}"'})

    def _create(self):
        self._require_token()
        asked = json.loads(self.body)
        owner = asked.get("organization") or self.hub.USER
        if owner != self.hub.USER:
            raise _Refusal(403, f"You don't have the rights to create a model under the namespace {owner}")
        name = f"{owner}/{asked['name']}"
        answer = {"url": f"{self.hub.url}/{name}", "name": name}
        if ("models", name) in self.hub.repositories:
            self._send_json(answer | {"error": "You already created this model repo"}, status=409)
            return
        self.hub.add("models", name, {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        self._send_json(answer)

    def _validate_yaml(self):
        content = json.loads(self.body)["content"]
        data = card_data({"README.md": content.encode()})
        errors = []
        if not isinstance(data, dict):
            errors.append({"message": "the metadata block must be a mapping"})
        elif not isinstance(data.get("tags", []), list):
            errors.append({"message": '"tags" must be an array'})
        elif "pipeline_tag" in data and data["pipeline_tag"] not in ("text-generation", "fill-mask"):
            errors.append({"message": '"pipeline_tag" must be a task'})
        self._send_json({"errors": errors, "warnings": []}, status=400 if errors else 200)

    def _preupload(self, kind, name, revision):
        self._require_token()
        _, _, files = self._files(kind, name, revision)
        answers = []
        for asked in json.loads(self.body)["files"]:
            path, sample = asked["path"], base64.b64decode(asked["sample"])
            large = self.hub.has_large_storage and (asked["size"] >= LARGE_BYTES or is_large(sample))
            mode = "lfs" if large else "regular"
            known = {"oid": entity_tag(files[path])} if path in files else {}
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False} | known)
        self._send_json({"files": answers})

    def _batch(self, name):
        self._require_token()
        self._repository("models", name)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            actions = {"upload": {"href": f"http://localhost:{self.hub.port}/storage/{asked['oid']}"}}
            objects.append(asked | ({} if asked["oid"] in self.hub.storage else {"actions": actions}))
        self._send_json({"transfer": "basic", "objects": objects})

    def _store(self, key):
        if hashlib.sha256(self.body).hexdigest() != key:
            raise _Refusal(400, "the content does not have this hash")
        self.hub.storage[key] = self.body
        self._send(b"")

    def _commit(self, kind, name, revision):
        self._require_token()
        repository, _, files = self._files(kind, name, revision)
        files = dict(files)
        for line in self.body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.hub.storage:
                    raise _Refusal(400, f"{value['path']}: its content was not uploaded")
                files[value["path"]] = self.hub.storage[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
            elif key == "deletedFolder":
                files = {path: content for path, content in files.items() if not path.startswith(value["path"])}
        with self.hub.lock:
            repository.commit(files)
        url = f"{self.hub.url}/{name}/commit/{repository.head}"
        self._send_json({"success": True, "commitOid": repository.head, "commitUrl": url, "hookOutput": ""})


def _entry(path, content):
    if content is None:
        return {"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0, "path": path}
    entry = {"type": "file", "oid": git_id(content), "size": len(content), "path": path}
    if is_large(content):
        entry["lfs"] = {"oid": entity_tag(content), "size": len(content), "pointerSize": 134}
    return entry
