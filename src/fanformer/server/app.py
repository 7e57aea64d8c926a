"""The routes: what each takes and answers, behind the gate."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

from fastapi import Body, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response

from fanformer import __version__
from fanformer.errors import ConfigError
from fanformer.server.answering import Answering, ClientGoneError, EventStream, refused_in_http, unless_gone
from fanformer.server.fields import (
    ChatFields,
    CompletionFields,
    DetokenizeFields,
    InsideFields,
    TokenizeFields,
    refuse_what_is_not_honoured,
)
from fanformer.server.gate import Gate
from fanformer.server.limits import Access, Limits
from fanformer.server.messages import shows
from fanformer.server.metrics import CONTENT_TYPE, render
from fanformer.server.models import ServedModel
from fanformer.server.page import add_page
from fanformer.server.planning import Plan, encode_conversation, plan_chat, plan_completion
from fanformer.server.refusal import ErrorEnvelope, RefusalError, invalid

_STARTED = 1767225600
"""When the models say they were made: the same at every start, for replicas must not differ."""
_CLIENT_GONE = 499
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "model": ErrorEnvelope}
    for status, text in (
        (400, "The request cannot be answered."),
        (401, "The API key is missing or wrong."),
        (403, "The Host or Origin header is not allowed."),
        (404, "There is no such model."),
        (408, "The request came too slowly."),
        (413, "The request is too large."),
        (429, "Too many requests wait."),
        (500, "The server failed."),
        (503, "The server is shutting down."),
        (504, "The answer took too long."),
    )
}


@dataclass(frozen=True)
class Service:
    """A server that is ready to be run."""

    models: Mapping[str, ServedModel]
    gate: Gate
    limits: Limits

    def close(self) -> None:
        """End all requests."""
        for model in self.models.values():
            model.close()

    @property
    def is_healthy(self) -> bool:
        """Whether every model computes."""
        return all(model.scheduler.is_healthy for model in self.models.values())


def build(
    models: Mapping[str, ServedModel],
    access: Access | None = None,
    limits: Limits | None = None,
    lost_log_lines: Callable[[], int] = lambda: 0,
) -> Service:
    """Return the application.

    Args:
        models: by the names that requests call them.
        access: who may ask.
        limits: how much.
        lost_log_lines: tells how many lines of the log could not be written.
    """
    access, limits = access or Access(), limits or Limits()
    if any(model.kinds for model in models.values()):
        limits = replace(limits, body_bytes=limits.media_body_bytes)
    app = FastAPI(title="FANformer", version=__version__, openapi_url="/openapi.json", docs_url=None, redoc_url=None)
    gate = Gate(app, access, limits)
    service = Service(models, gate, limits)
    _handle_errors(app)
    _add_generation(app, service)
    _add_models(app, service)
    _add_tokenizer(app, service)
    _add_inside(app, service)
    _add_state(app, service, lost_log_lines)
    add_page(app)
    _mend_schema(app, list(models))
    return service


def _mend_schema(app: FastAPI, names: Sequence[str]) -> None:
    """Put the models' names into the schema, and take out what FastAPI says of wrong fields: here a 400 like any."""
    whole = app.openapi

    def mended() -> dict[str, Any]:
        schema = whole()
        for operations in schema["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                for parameter in operation.get("parameters", ()):
                    parameter["schema"]["enum"] = list(names)  # the only one is a model's name
        for described in schema["components"]["schemas"].values():
            field = described.get("properties", {}).get("model")
            if field is not None:
                field.get("anyOf", [field])[0]["enum"] = list(names)
        return schema

    app.openapi = mended


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(RefusalError)
    async def refused(request: HTTPRequest, error: RefusalError) -> Response:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def wrong_fields(request: HTTPRequest, error: RequestValidationError) -> Response:
        return await refused(request, _field_refusal(error))

    @app.exception_handler(HTTPException)
    async def no_route(request: HTTPRequest, error: HTTPException) -> Response:
        messages = {404: "there is no such path.", 405: "the path does not take this method."}
        refusal = RefusalError(
            error.status_code, messages.get(error.status_code, "the body cannot be read: expected JSON.")
        )
        return JSONResponse(refusal.body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failed(request: HTTPRequest, error: Exception) -> Response:  # the gate logs it
        return await refused(request, RefusalError(500, "internal error: see the server's log", code="internal"))

    @app.exception_handler(ClientGoneError)
    async def gone(request: HTTPRequest, error: ClientGoneError) -> Response:
        return Response(status_code=_CLIENT_GONE)


def _field_refusal(error: RequestValidationError) -> RefusalError:
    """Return what is wrong with the first wrong field."""
    errors = error.errors()
    first = errors[0]
    if first["type"] == "json_invalid":
        return invalid("the body is no JSON: send an object with Content-Type: application/json.", None, "invalid_json")
    place = first["loc"][1:]
    if not place:
        return invalid("the body must be a JSON object, with Content-Type: application/json.", None, "invalid_json")
    field = str(place[0])[:64]
    if field == "messages":  # a part that is wrong is told before that parts are no text
        first = max(errors, key=lambda one: len(one["loc"]))
    got = "" if first["type"] == "missing" else f", got {_shown(first['input'])}"
    reason = first["msg"][:1].lower() + first["msg"][1:]
    name = _named(first["loc"][1:]) if field == "messages" else field
    return invalid(f"`{name}` is wrong: {reason}{got}.", field, "invalid_value")


def _named(place: Sequence[str | int]) -> str:
    """Return a place as clients write it, such as messages[0].content, without the names of types on the way."""
    words = [part for part in place if isinstance(part, int) or not (part == "str" or "[" in part)]
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in words)[1:65]


def _shown(value: Any) -> str:
    """Return a value for a message; no text that may be part of a prompt."""
    if isinstance(value, bool | int | float) or value is None:
        return repr(value)[:40]
    return "a string" if isinstance(value, str) else "an array" if isinstance(value, list) else "an object"


def _add_generation(app: FastAPI, service: Service) -> None:
    async def answer(request: HTTPRequest, model: ServedModel, plan: Plan, is_chat: bool) -> Response:
        answering = Answering(model, plan, is_chat, service.limits.answer_seconds, request.state.client)
        if plan.stream:
            return EventStream(answering)
        return JSONResponse(await unless_gone(request, answering.whole()))

    looking = asyncio.Lock()

    async def plan_shown(fields: ChatFields, model: ServedModel, client: str) -> Plan:
        """Let one request after the other look at its pictures: others' threads and the memory are spared.

        A thread goes on when its client has hung up, and so keeps its turn until it ends.
        """
        await looking.acquire()
        try:
            with refused_in_http(model.scheduler):
                model.scheduler.check_room(client=client)
            work = asyncio.ensure_future(asyncio.to_thread(plan_chat, fields, model))
        except BaseException:
            looking.release()
            raise
        work.add_done_callback(lambda _: looking.release())
        return await asyncio.shield(work)

    @app.post("/v1/completions", responses=_ERRORS)
    async def completions(request: HTTPRequest, fields: Annotated[CompletionFields, Body()]) -> Response:
        """Continue texts."""
        model = _find(service, fields.model)
        return await answer(request, model, await asyncio.to_thread(plan_completion, fields, model), False)

    @app.post("/v1/chat/completions", responses=_ERRORS)
    async def chat_completions(request: HTTPRequest, fields: Annotated[ChatFields, Body()]) -> Response:
        """Answer a conversation."""
        model = _find(service, fields.model)
        if shows(fields.messages):
            plan = await unless_gone(request, plan_shown(fields, model, request.state.client))
        else:
            plan = await asyncio.to_thread(plan_chat, fields, model)
        return await answer(request, model, plan, True)


def _find(service: Service, name: str | None) -> ServedModel:
    """Return the model of that name; without a name the first."""
    if name is None:
        return next(iter(service.models.values()))
    if name not in service.models:
        raise RefusalError(
            404, f"there is no such model, expected one of: {', '.join(service.models)}.", "model", "model_not_found"
        )
    return service.models[name]


def _add_models(app: FastAPI, service: Service) -> None:
    def described(model: ServedModel) -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            "created": _STARTED,
            "owned_by": "fanformer",
            "max_model_len": model.positions,
            "capabilities": model.capabilities,
        }

    @app.get("/v1/models", responses=_ERRORS)
    async def models() -> dict[str, Any]:
        """List the models."""
        return {"object": "list", "data": [described(model) for model in service.models.values()]}

    @app.get("/v1/models/{name:path}", responses=_ERRORS)
    async def model(name: str) -> dict[str, Any]:
        """Describe a model."""
        return described(_find(service, name))


def _add_tokenizer(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize", responses=_ERRORS)
    def tokenize(fields: Annotated[TokenizeFields, Body()]) -> dict[str, Any]:
        """Return the token ids of a text, or of a conversation up to where the answer begins."""
        refuse_what_is_not_honoured(fields)
        model = _find(service, fields.model)
        if (fields.prompt is None) == (fields.messages is None):
            raise invalid("exactly one of `prompt` and `messages` must be given, got both or neither.", "prompt")
        try:
            if fields.messages is not None:
                ids = encode_conversation(model, fields.messages).ids
            else:
                text = fields.prompt or ""
                named = None if fields.add_special_tokens else model.special_id(text)  # so lm-eval asks for ids
                ids = model.encode(text)[0 if fields.add_special_tokens else 1 :] if named is None else [named]
        except ConfigError as error:
            raise invalid(str(error), "prompt") from error
        return {"count": len(ids), "max_model_len": model.positions, "tokens": ids}

    @app.post("/detokenize", responses=_ERRORS)
    def detokenize(fields: Annotated[DetokenizeFields, Body()]) -> dict[str, Any]:
        """Return the text of token ids."""
        refuse_what_is_not_honoured(fields)
        model = _find(service, fields.model)
        if max(fields.tokens, default=0) >= model.known:
            raise invalid(f"`tokens` has the id {max(fields.tokens)}, expected ids below {model.known}.", "tokens")
        return {"prompt": model.reader.decode(fields.tokens)}

    @app.get("/tokenizer_info", responses=_ERRORS)
    async def tokenizer_info() -> dict[str, Any]:
        """Tell the special tokens and the chat template of the first model."""
        model = _find(service, None)
        names = {
            f"{name}_token": None if number is None else model.token_bytes(number).decode(errors="replace")
            for name, number in model.special_ids.items()
        }
        return {"chat_template": model.chat_template, "model_max_length": model.positions, **names}


def _add_inside(app: FastAPI, service: Service) -> None:
    @app.post("/inside", responses=_ERRORS)
    def inside(fields: Annotated[InsideFields, Body()]) -> dict[str, Any]:
        """Tell what the gates and Fourier channels of every block do on a text, and how the heads of one attend."""
        refuse_what_is_not_honoured(fields)
        model = _find(service, fields.model)
        param = "prompt" if model.has_inside else "model"
        try:
            tokens, blocks = model.look_inside(fields.prompt)
            found = {"model": model.name, "tokens": tokens, "layers": [asdict(block) for block in blocks]}
            if fields.layer is None:
                return found
            param = "layer"
            ids, heads = model.attention_maps(fields.prompt, fields.layer)
        except ConfigError as error:
            raise invalid(str(error), param) from error
        shares = [[[round(share, 4) for share in row] for row in head] for head in heads]
        names = [model.token_name(number) for number in ids]
        return found | {"attention": {"layer": fields.layer, "tokens": names, "heads": shares}}


def _add_state(app: FastAPI, service: Service, lost_log_lines: Callable[[], int]) -> None:
    @app.get("/health", responses=_ERRORS)
    async def health() -> Response:
        """Tell whether new requests are welcome."""
        status = "draining" if service.gate.draining else "ok" if service.is_healthy else "broken"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    @app.get("/metrics", responses=_ERRORS, response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Tell numbers for Prometheus."""
        text = render(service.models.values(), service.gate, lost_log_lines())
        return PlainTextResponse(text, media_type=CONTENT_TYPE)
