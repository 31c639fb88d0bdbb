"""uvicorn's HTTP connection with the patience it lacks, and with refusals in OpenAI's shape."""

from __future__ import annotations

import asyncio
import json
import sys

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from infer.server import errors

MAX_CONNECTIONS = 1000
# Seconds for the line and the headers of a request, and for a client to read what was sent.
HEAD_SECONDS = 10.0
READ_SECONDS = 60.0


class Connection(H11Protocol):
    """One connection."""

    head_seconds = HEAD_SECONDS
    read_seconds = READ_SECONDS
    max_connections = MAX_CONNECTIONS
    _head_timer: asyncio.TimerHandle | None = None
    _read_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            self._refuse(503, "too many connections are open; try again")
        else:
            self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._read_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        self._watch_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        # What a client does not read stays in memory: it is not waited for without end.
        self._read_timer = self.loop.call_later(self.read_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._read_timer is not None:
            self._read_timer.cancel()

    def send_400_response(self, msg: str) -> None:
        error = sys.exc_info()[1]  # uvicorn is handling it and keeps it to itself
        if getattr(error, "error_status_hint", 400) == 431:
            self._refuse(431, errors.LARGE_HEAD)
        else:
            self._refuse(400, "what was sent is not valid HTTP/1.1")

    def _watch_head(self) -> None:
        """Runs a clock while the head of a request is awaited, or the rest of one that has been answered."""
        waits = self.conn.their_state is h11.IDLE or self.conn.our_state is h11.DONE
        if not waits or self.transport.is_closing():
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_seconds, self._head_is_late)

    def _head_is_late(self) -> None:
        self._refuse(408, f"the headers of the request did not come within {self.head_seconds:g} s")

    def _refuse(self, status: int, message: str) -> None:
        """Answers by itself, and closes."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not self.transport.is_closing():
            data = json.dumps(errors.body(status, message)).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(data))),
                ("connection", "close"),
            ]
            response = h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status])
            for event in (response, h11.Data(data=data), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
