"""Errors in the shape that OpenAI's clients read, all four keys of it."""

import logging
import traceback
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from fanformer.errors import FANformerError

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class RefusalError(FANformerError):
    """A request that is not answered, with the HTTP status that says whose fault it is."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Say why.

        Args:
            status: of HTTP.
            message: one line: name, got, expected, remedy.
            param: the field that is wrong.
            code: a word for programs.
            headers: to send besides.
        """
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """What is sent."""
        return {"error": error_object(self.status, str(self), self.param, self.code)}


class ErrorObject(BaseModel):
    """An error of OpenAI's shape, for the schema."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(BaseModel):
    """What is sent instead of an answer."""

    error: ErrorObject


def error_object(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return an error of OpenAI's shape, without its envelope.

    Source: `Error` of OpenAI's OpenAPI document: message, type, param and code are all required.
    """
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"message": message, "type": kind, "param": param, "code": code}


def invalid(message: str, param: str | None = None, code: str | None = None) -> RefusalError:
    """Return the refusal of a request that can never be answered: 400."""
    return RefusalError(400, message, param, code)


def log_failure(log: logging.Logger, what: str, error: BaseException) -> None:
    """Log where an error came from, but not its message, in which a prompt could stand."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    log.error("%s: %s\n%s", what, type(error).__name__, frames.rstrip())
