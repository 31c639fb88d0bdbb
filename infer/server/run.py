"""From the options to a server that listens, and from a signal to its end.

The first SIGTERM or Ctrl-C refuses what is new and lets running answers end, within --drain-seconds. The second ends
the process where it is.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import uvicorn

from infer.config import FULL_ROWS, Serve
from infer.model import Opened, open_for
from infer.server.answers import NOT_FINITE
from infer.server.app import make_app
from infer.server.connection import Connection
from infer.server.errors import MAX_HEAD
from infer.server.guard import Settings, is_loopback
from infer.server.prepare import Served
from infer.server.service import Service
from infer.terminal import warn
from qwen_jax.engine import Capacity, Engine, Replicas, Request
from qwen_jax.errors import ConfigError, FileError, NumericalError
from qwen_jax.text.chat import Format
from qwen_jax.text.template import JinjaFormat
from qwen_jax.weights import strict_json

# Bytes that a request may have: of text for a token with room to spare, and of all else.
_BYTES_PER_TOKEN = 32
_MORE_BYTES = 2**20
# Connections get this long, in seconds, to take what was written to them.
_CLOSE_SECONDS = 5


def run(options: Serve) -> int:
    """Serves until a signal; the exit code."""
    key = _key(options)
    if key is None and not is_loopback(options.host):
        raise ConfigError(f"--host {options.host} lets others in; give --api-key-file FILE or --api-key-env NAME, too")
    with _listen(options.host, options.port) as listener:
        opened = open_for(options)
        length, rows = opened.room(options.max_length), options.max_rows
        served = _served(options, opened, length)
        cache_tokens = options.cache_tokens or min(rows, FULL_ROWS) * length
        engine = opened.load(Capacity(max_rows=rows, max_length=length, cache_tokens=cache_tokens))
        opened.report()
        copies = options.mesh.get("data", 1)
        _try(engine, served, copies)
        service = Service(engine, room=copies * rows + options.max_waiting)
        max_body = min(_MORE_BYTES + _BYTES_PER_TOKEN * length, strict_json.MAX_BYTES)
        server = make_server(service, served, Settings(key=key, max_body=max_body))
        _log_to_stderr()
        host, port = listener.getsockname()[:2]
        print(f"infer: serving {served.name} at http://{f'[{host}]' if ':' in host else host}:{port}", file=sys.stderr)
        asyncio.run(_serve_until_signal(server, service, listener, options.drain_seconds))
    return _code(service)


def _try(engine: Engine | Replicas, served: Served, copies: int) -> None:
    """Makes two tokens, which compiles what most requests need: a model that cannot run says so before it is asked."""
    for length in range(1, copies + 1):  # other prompts are for other copies
        prompt = [served.tokenizer.end_of_text] * length
        engine.add(Request(prompt=prompt, max_new_tokens=2, sampling=served.sampling))
    while engine.busy:
        if any(token.finish_reason == "error" for token in engine.step()):
            raise NumericalError(NOT_FINITE)


def make_server(service: Service, served: Served, settings: Settings) -> uvicorn.Server:
    """A server of HTTP that leaves signals alone and trusts no header of a proxy."""
    config = uvicorn.Config(
        make_app(service, served, settings),
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        proxy_headers=False,
        server_header=False,
        h11_max_incomplete_event_size=MAX_HEAD,
        timeout_graceful_shutdown=_CLOSE_SECONDS,
    )
    return _Server(config)


class _Server(uvicorn.Server):
    def capture_signals(self) -> AbstractContextManager[None]:
        return nullcontext()


async def serve(
    server: uvicorn.Server, service: Service, listener: socket.socket, stop: asyncio.Event, *, drain_seconds: float
) -> None:
    """Serves until `stop` is set, and then until the answers have ended or their time is over; or the engine fails."""
    service.start()
    serving = asyncio.create_task(server.serve([listener]))
    ends = [asyncio.create_task(event.wait()) for event in (stop, service.failed)]
    await asyncio.wait({serving, *ends}, return_when=asyncio.FIRST_COMPLETED)
    await service.drain(drain_seconds)
    server.should_exit = True
    await serving
    for end in ends:
        end.cancel()
    await service.stop()


async def _serve_until_signal(
    server: uvicorn.Server, service: Service, listener: socket.socket, drain_seconds: float
) -> None:
    stop = asyncio.Event()

    def hear(number: int) -> None:
        if stop.is_set():
            os._exit(128 + number)
        print("infer: no new requests; the server ends when running answers have", file=sys.stderr)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, hear, number)
    await serve(server, service, listener, stop, drain_seconds=drain_seconds)


def _code(service: Service) -> int:
    """0, or the end that the engine's failure makes."""
    if service.error is None:
        return 0
    if service.stuck:
        # Its thread holds on to the interpreter, and would for ever.
        print(f"infer: error: {service.error}", file=sys.stderr, flush=True)
        os._exit(1)
    raise service.error


def _key(options: Serve) -> str | None:
    """The key, wherever it is; None for no key."""
    key, name, path = options.api_key, options.api_key_env, options.api_key_file
    where = "--api-key"
    if name is not None:
        where = f"the environment variable {name}"
        key = os.environ.get(name, "")
    elif path is not None:
        where = str(path)
        try:
            key = path.expanduser().read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FileError(f"cannot read the key from {path}: {error}") from error
    if key is None:
        return None
    if not key.strip():
        raise ConfigError(f"{where} holds no key; anything that is hard to guess will do")
    return key.strip()


def _listen(host: str, port: int) -> socket.socket:
    """The socket, bound but not yet listening: a port that is taken is said before a model is read."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}; choose others") from error
    return listener


def _served(options: Serve, opened: Opened, max_length: int) -> Served:
    path = Path(options.model).expanduser()
    return Served(
        name=options.served_model_name or (path.resolve().name if path.exists() else options.model),
        created=int(time.time()),
        tokenizer=opened.tokenizer,
        form=_form(options, opened),
        thinks_unasked=options.thinking,
        sampling=opened.sampling,
        max_new_tokens=options.max_new_tokens or opened.usage.max_new_tokens,
        stop_ids=opened.usage.stop_ids,
        max_length=max_length,
    )


def _form(options: Serve, opened: Opened) -> Format | JinjaFormat | None:
    """The format of chats; a model without one still completes texts."""
    try:
        return opened.chat_format()
    except ConfigError as error:
        if options.format or not options.thinking:
            raise
        warn(f"{error}; until then /v1/chat/completions refuses")
        return None


class _OneLine(logging.Formatter):
    """Lines in which what a client sent can neither begin another line nor be obeyed by a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        lines = super().format(record).split("\n")
        return "\n  ".join("".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in lines)


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine("%(asctime)s %(message)s"))
    logger = logging.getLogger("uvicorn")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
