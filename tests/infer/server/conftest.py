"""A server on a port of this machine, in front of an engine that says what a test has it say, or of a real one."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import socket
import threading
import time
from collections import deque

import httpx
import numpy as np
import pytest

from infer.server.guard import Settings
from infer.server.prepare import Served
from infer.server.run import make_server, serve
from infer.server.service import Service
from qwen_jax.engine import Sampling, Stats, Token
from qwen_jax.errors import DataError
from qwen_jax.text import Tokenizer, train_bpe
from qwen_jax.text.chat import FORMATS

KEY = "schlüssel"
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
HOLES = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")


class ScriptedEngine:
    """Says what `says` makes of a request, a token per row and step; fails, waits or gives errors where told to."""

    max_length = 1000

    def __init__(self, tokenizer, max_rows=4):
        self.tokenizer, self.max_rows, self.random = tokenizer, max_rows, np.random.default_rng(0)
        self.runs = threading.Event()  # cleared, every step waits
        self.reset()

    def reset(self):
        self.says = lambda request: "fine"
        self.fails, self.pause = None, 0.0
        self.runs.set()
        self.asked, self.cancelled, self.made, self.num_steps = [], [], {}, 0
        self.waiting, self.running = deque(), {}

    def add(self, request):
        if len(request.prompt) + request.max_new_tokens > self.max_length:
            raise DataError("too long")
        self.asked.append(request)
        self.waiting.append(len(self.asked) - 1)
        return len(self.asked) - 1

    def cancel(self, number):
        if number in self.waiting or number in self.running:
            self.cancelled.append(number)
            self.running.pop(number, None)
            self.waiting = deque(x for x in self.waiting if x != number)

    def step(self):
        self.runs.wait()
        time.sleep(self.pause)
        if self.fails:
            raise self.fails
        self.num_steps += 1
        while self.waiting and len(self.running) < self.max_rows:
            number = self.waiting.popleft()
            self.running[number] = deque(self.tokenizer.encode_trusted(self.says(self.asked[number])))
            self.made[number] = 0
        return [self._token(number) for number in list(self.running)]

    def _token(self, number):
        request, left = self.asked[number], self.running[number]
        self.made[number] += 1
        token = left.popleft() if left else min(request.stop_ids)
        if request.constraint:  # what comes first of what is allowed, or ends it
            bits = np.unpackbits(request.constraint.mask().view(np.uint8), bitorder="little")
            token = min(request.stop_ids) if bits[min(request.stop_ids)] else self.random.choice(np.flatnonzero(bits))
            request.constraint.accept(int(token))
        reason = (
            "stop" if token in request.stop_ids else "length" if self.made[number] == request.max_new_tokens else None
        )
        if reason:
            del self.running[number]
        top = [(token, -0.5), (0, -1.5)][: request.logprobs or 0]
        return Token(number, int(token), reason, None if request.logprobs is None else -0.5, top)

    @property
    def busy(self):
        return bool(self.waiting or self.running)

    @property
    def stats(self):
        zeros = {field.name: 0 for field in dataclasses.fields(Stats)}
        counts = dict(num_waiting=len(self.waiting), num_running=len(self.running), steps=self.num_steps)
        return Stats(**(zeros | counts))


@dataclasses.dataclass
class Running:
    """A server that runs, and what a test does to it."""

    url: str
    port: int
    engine: object
    service: Service
    stop: object
    thread: threading.Thread

    @property
    def http(self):
        return httpx.Client(base_url=self.url, timeout=30, trust_env=False, verify=False)

    def post(self, path, body, **options):
        with self.http as client:
            return client.post(path, json=body, **options)

    def wait_until(self, holds, seconds=10):
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.005)

    def send(self, data, *, seconds=10):
        """What comes back for raw bytes, up to the end of the connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as connection:
            connection.sendall(data)
            with contextlib.suppress(ConnectionResetError):
                return b"".join(iter(lambda: connection.recv(65536), b""))
            return b""


@contextlib.contextmanager
def run_server(engine, tokenizer, *, room=8, patience=60.0, drain_seconds=5.0, served=None, fails=False, **settings):
    """A server in a thread. Leaving it stops it, as a signal would, and raises what the engine failed with."""
    defaults = Served(
        name="tiny",
        created=0,
        tokenizer=tokenizer,
        form=FORMATS["qwen3"],
        thinks_unasked=True,
        sampling=Sampling(temperature=0.5),
        max_new_tokens=None,
        stop_ids=frozenset({tokenizer.end_of_text}),
        max_length=engine.max_length,
    )
    settings = Settings(**({"key": None, "max_body": 2**20} | settings))
    ready, box = threading.Event(), {}

    async def main():
        service = Service(engine, room=room, patience=patience)
        server = make_server(service, dataclasses.replace(defaults, **(served or {})), settings)
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        box.update(service=service, stop=lambda: loop.call_soon_threadsafe(stop.set))
        asyncio.get_running_loop().call_later(0.01, ready.set)
        await serve(server, service, listener, stop, drain_seconds=drain_seconds)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # what is not read is felt early
        port = listener.getsockname()[1]
        thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
        thread.start()
        assert ready.wait(10)
        running = Running(f"http://127.0.0.1:{port}", port, engine, thread=thread, **box)
        try:
            yield running
        finally:
            if isinstance(engine, ScriptedEngine):
                engine.runs.set()
            with contextlib.suppress(RuntimeError):  # it may have ended by itself
                running.stop()
            thread.join(20)
            assert not thread.is_alive()
            if box["service"].error is not None and not fails:
                raise box["service"].error


@pytest.fixture(scope="session")
def tagged(tokenizer):
    """A tokenizer with the tokens of thoughts, of calls and of code with holes."""
    spec = json.loads(train_bpe(["low lower lowest, newer newest wider. " * 3], vocab_size=276).to_bytes())
    for index, content in enumerate((*TAGS, *HOLES), 276):
        token = {"id": index, "content": content, "special": content in HOLES}
        spec["added_tokens"].append(spec["added_tokens"][0] | token)
    return Tokenizer(json.dumps(spec).encode())


@pytest.fixture(scope="module")
def _scripted(tagged):
    with run_server(ScriptedEngine(tagged), tagged) as running:
        yield running


@pytest.fixture
def scripted(_scripted):
    """A server whose engine says what the test has it say."""
    _scripted.engine.reset()
    yield _scripted
    _scripted.engine.runs.set()
    _scripted.wait_until(lambda: not _scripted.engine.busy and not _scripted.service._jobs)
