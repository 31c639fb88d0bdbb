"""Refusals as OpenAI's API words them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response

from qwen_jax.errors import UserError

# Bytes of the line and the headers of a request.
MAX_HEAD = 16 * 2**10
LARGE_HEAD = f"the line and the headers of the request are larger than {MAX_HEAD} bytes"
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_TEXT = {"type": ["string", "null"]}
# The form of an error, for the description of the API.
SCHEMA = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {"message": {"type": "string"}, "type": {"type": "string"}, "param": _TEXT, "code": _TEXT},
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
# What is left of a message that quotes a client at length.
_MAX_MESSAGE = 1000


class ApiError(HTTPException):
    """A refusal.

    Attributes:
      status_code: of the response.
      detail: one line: what was given, what was wanted, the way out.
      param: the field of the request that is to blame.
      code: OpenAI's word for some errors, which clients compare.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        close: bool = False,
    ) -> None:
        """`retry_after` is in seconds; with `close` the connection ends, since what follows on it is not read."""
        headers = {"Retry-After": str(retry_after)} if retry_after is not None else {}
        super().__init__(status, message, headers | ({"Connection": "close"} if close else {}))
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        return body(self.status_code, self.detail, param=self.param, code=self.code)


def body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The JSON of an error."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message[:_MAX_MESSAGE], "type": kind, "param": param, "code": code}}


def response(error: HTTPException) -> Response:
    """The response that tells of an error, of ours or the framework's own."""
    content = error.body() if isinstance(error, ApiError) else body(error.status_code, error.detail)
    return json_response(content, status=error.status_code, headers=dict(error.headers or {}))


def json_response(content: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """`content` in ASCII: what a client sent and a message quotes may hold what UTF-8 cannot."""
    data = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return Response(data, status, headers, media_type="application/json")


@contextmanager
def blaming(param: str | None) -> Iterator[None]:
    """Makes of a user's error the refusal of a request whose field `param` is to blame."""
    try:
        yield
    except UserError as error:
        raise ApiError(400, str(error), param=param) from error
