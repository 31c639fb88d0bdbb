"""What every request passes before it reaches a route: the host it names, its key, the size and pace of its body."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import hmac
import ipaddress
import time
from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infer.server import errors, page
from infer.server.errors import ApiError
from infer.server.metrics import Metrics

# Readable without a key: whether the server is well, and the page that asks for the key.
_OPEN = {"/health", *page.FILES}
_DISCARD_SECONDS = 3.0
_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is let in.

    Attributes:
      key: what clients must know; None for nothing, where this machine alone can reach the server.
      max_body: bytes of a request.
      body_seconds: how long a body may take.
    """

    key: str | None
    max_body: int
    body_seconds: float = 30.0


def is_loopback(host: str) -> bool:
    """Whether an address is of this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Guard:
    """The outermost layer of the application."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._digest = None if settings.key is None else _digest(settings.key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        send = self._counted(scope, send)
        try:
            headers = _headers(scope)
            self._check_host(headers)
            self._check_key(scope["path"], headers)
            self._check_lengths(scope, headers)
        except ApiError as error:
            await self._discard(receive)
            return await errors.response(error)(scope, receive, send)
        await self._app(scope, self._limited(receive), send)

    def _check_host(self, headers: Mapping[bytes, list[bytes]]) -> None:
        """Without a key, a request must name this machine, as a page elsewhere whose name leads here does not."""
        if self._digest is not None:
            return
        hosts = headers.get(b"host", [])
        name = hosts[0].decode("latin-1").lower() if len(hosts) == 1 else ""
        name = name[: name.index("]") + 1] if name.startswith("[") and "]" in name else name.partition(":")[0]
        if not is_loopback(name):
            raise ApiError(403, "the Host header does not name this machine; use localhost or 127.0.0.1", close=True)

    def _check_key(self, path: str, headers: Mapping[bytes, list[bytes]]) -> None:
        if self._digest is None or path in _OPEN:
            return
        given = headers.get(b"authorization", [])
        scheme, _, key = (given[0] if len(given) == 1 else b"").partition(b" ")
        # Digests are of one length, so that nothing about the key shows in the time a comparison takes.
        if scheme.lower() != b"bearer" or not hmac.compare_digest(_digest(key.strip()), self._digest):
            message = "no valid key was given; send the header Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", close=True)

    def _check_lengths(self, scope: Scope, headers: Mapping[bytes, list[bytes]]) -> None:
        """Refuses what shows from the start that it is too long, or that its end can be taken for two places."""
        # The HTTP library sees to this only while a head is not complete.
        if (
            sum(len(name) + len(value) + 4 for name, value in scope["headers"]) + len(scope["raw_path"])
            > errors.MAX_HEAD
        ):
            raise ApiError(431, errors.LARGE_HEAD, close=True)
        length = headers.get(b"content-length")
        if length and b"transfer-encoding" in headers:
            raise ApiError(400, "the request has both Content-Length and Transfer-Encoding; send one", close=True)
        if length and int(length[0]) > self._settings.max_body:  # the library has seen that it is one number
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the request is larger than {self._settings.max_body} bytes", close=True)

    def _limited(self, receive: Receive) -> Receive:
        """`receive`, which refuses a body that does not end in size or time."""
        size, deadline, ended = 0, time.monotonic() + self._settings.body_seconds, False

        async def limited() -> Message:
            nonlocal size, ended
            try:
                async with asyncio.timeout(None if ended else deadline - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                seconds = self._settings.body_seconds
                raise ApiError(408, f"the request did not come whole within {seconds:g} s", close=True) from None
            size += len(message.get("body", b""))
            ended = not message.get("more_body", False)
            if size > self._settings.max_body:
                await self._discard(receive)
                raise self._too_large()
            return message

        return limited

    async def _discard(self, receive: Receive) -> None:
        """Takes what a client is sending, for a while: who is cut off while sending does not get to read why."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(_DISCARD_SECONDS, self._settings.body_seconds)):
                while (await receive()).get("more_body"):
                    pass

    def _counted(self, scope: Scope, send: Send) -> Send:
        """`send`, which counts responses and adds the headers that all of them have."""

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "other")  # of what is routed nowhere, clients make up any
                self._metrics.requests.labels(route, message["status"]).inc()
                message = {**message, "headers": [*message["headers"], *_HEADERS]}
            await send(message)

        return counted


def _headers(scope: Scope) -> dict[bytes, list[bytes]]:
    headers: dict[bytes, list[bytes]] = {}
    for name, value in scope["headers"]:
        headers.setdefault(name, []).append(value)
    return headers


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
