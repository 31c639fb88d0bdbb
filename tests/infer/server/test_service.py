"""The way to the engine and back: who goes away, who waits, what fails, and how it ends."""

from __future__ import annotations

import json
import socket
import threading
import time

import httpx
import pytest

from tests.infer.server.conftest import ScriptedEngine, run_server
from tests.infer.server.test_refusals import refused

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "low"}], "max_tokens": 500}


def begin(running, **body):
    """A connection on which a request has been made; what follows is up to the caller."""
    connection = socket.create_connection(("127.0.0.1", running.port), timeout=10)
    connection.sendall(chat(ASK | body))
    return connection


def chat(body):
    """The bytes of a request."""
    data = json.dumps(body).encode()
    headers = ("Host: localhost", "Content-Type: application/json", f"Content-Length: {len(data)}")
    return "\r\n".join([f"POST {CHAT} HTTP/1.1", *headers, "", ""]).encode() + data


def rest(connection):
    with connection:
        return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_gives_up_the_row(scripted, stream):
    engine = scripted.engine
    engine.says, engine.pause = lambda request: "low " * 400, 0.002
    made = lambda: min(engine.made.values(), default=0) if len(engine.asked) == 6 else 0
    for least in (0, 3, None):  # at once, while some wait and others are made, and before there is anything
        engine.asked, engine.made = [], {}
        connections = [begin(scripted, stream=stream, n=2) for _ in range(3)]
        if least is not None:
            scripted.wait_until(lambda: len(engine.running) == 4 and made() >= least)  # noqa: B023
        for connection in connections:
            connection.close()
        steps = engine.num_steps
        scripted.wait_until(lambda: not engine.busy and not scripted.service._jobs)
        assert scripted.service._num_rows == 0 and not scripted.service._rows
        assert engine.num_steps - steps < 50  # of the 400 that the rows had left
    assert scripted.post(CHAT, ASK | {"max_tokens": 2}).status_code == 200


def test_a_row_is_cancelled_within_a_step(scripted):
    engine = scripted.engine
    engine.says = lambda request: "low " * 100
    connection = begin(scripted, stream=True)
    scripted.wait_until(lambda: engine.num_steps > 2)
    engine.runs.clear()
    connection.close()
    scripted.wait_until(lambda: not scripted.service._jobs)
    steps = engine.num_steps
    engine.runs.set()
    scripted.wait_until(lambda: engine.cancelled == [0])
    assert engine.num_steps <= steps + 1


def test_who_goes_away_while_the_row_is_added_leaves_none(scripted, monkeypatch):
    engine, added, adds = scripted.engine, threading.Event(), threading.Event()
    engine.says, engine.pause = lambda request: "low " * 400, 0.002
    add = engine.add
    monkeypatch.setattr(engine, "add", lambda request: (adds.set(), added.wait(10), add(request))[-1])
    connection = begin(scripted)
    assert adds.wait(10)
    connection.close()
    scripted.wait_until(lambda: not scripted.service._jobs)
    added.set()
    scripted.wait_until(lambda: engine.cancelled == [0])
    assert engine.num_steps < 50


def test_what_cannot_wait_is_refused_at_once_and_the_others_are_not_harmed(scripted):
    engine = scripted.engine
    engine.runs.clear()
    connections = [begin(scripted, n=4) for _ in range(2)]
    scripted.wait_until(lambda: len(scripted.service._jobs) == 2)
    with scripted.http as http:
        response = http.post(CHAT, json=ASK)
        refused(response, 429)
        assert int(response.headers["retry-after"]) > 0
        assert http.get("/health").status_code == 200
        engine.runs.set()
        for connection in connections:
            assert connection.recv(15) == b"HTTP/1.1 200 OK"
            connection.close()
        assert http.post(CHAT, json=ASK).status_code == 200


def test_rows_are_made_in_the_order_they_came(scripted):
    engine = scripted.engine
    engine.runs.clear()
    connections = []
    for index in range(8):
        connections.append(begin(scripted, stream=True, seed=index))
        scripted.wait_until(lambda: len(engine.asked) + scripted.service._orders.qsize() == len(connections))
    engine.runs.set()
    for connection in connections:
        while b"[DONE]" not in connection.recv(65536):
            pass
        connection.close()
    assert [request.seed for request in engine.asked] == list(range(8))


def test_an_answer_that_is_not_read_is_not_kept_for_ever(scripted, monkeypatch):
    from infer.server.connection import Connection

    monkeypatch.setattr(Connection, "read_seconds", 0.1)
    engine = scripted.engine
    engine.says = lambda request: "low lower lowest " * 60
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    connection.connect(("127.0.0.1", scripted.port))
    connection.sendall(chat(ASK | dict(stream=True, n=8, logprobs=True, top_logprobs=2, max_tokens=900)))
    scripted.wait_until(lambda: scripted.service._jobs)
    scripted.wait_until(lambda: not scripted.service._jobs, seconds=30)
    connection.close()


def failing(engine, tagged, fails, patience):
    """What clients of a server see whose engine fails: the errors, then nothing."""
    with run_server(engine, tagged, patience=patience, fails=True) as running:
        engine.runs.clear()
        streams = [begin(running, stream=True), begin(running, stream=False)]
        running.wait_until(lambda: len(running.service._jobs) == 2)
        fails()
        stream, whole = (rest(connection) for connection in streams)
        running.thread.join(10)
        assert not running.thread.is_alive()
        stuck = running.service.stuck
        engine.runs.set()
        running.service._thread.join(10)
        return running.service.error, stuck, stream, whole


def test_a_step_that_fails_ends_the_server(tagged):
    engine = ScriptedEngine(tagged)

    def fails():
        engine.fails = RuntimeError("out of memory")
        engine.runs.set()

    error, stuck, stream, whole = failing(engine, tagged, fails, patience=60)
    assert isinstance(error, RuntimeError) and not stuck
    for answer in (stream, whole):
        assert b"server_error" in answer and b"[DONE]" not in answer
    assert whole.startswith(b"HTTP/1.1 500")


def test_a_step_that_does_not_end_ends_the_server(tagged, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda failure: None)  # of the thread, which outlives its server here
    error, stuck, stream, whole = failing(ScriptedEngine(tagged), tagged, lambda: None, patience=0.3)
    assert isinstance(error, TimeoutError) and stuck
    assert b"server_error" in stream and whole.startswith(b"HTTP/1.1 500")


def test_logits_that_are_not_finite_are_an_error_of_their_request_alone(scripted, monkeypatch):
    engine = scripted.engine
    token = engine._token
    monkeypatch.setattr(
        engine, "_token", lambda number: token(number).__class__(number, -1, "error") if number == 0 else token(number)
    )
    refused(scripted.post(CHAT, ASK), 500, "not finite")
    engine.running.clear()
    assert scripted.post(CHAT, ASK).status_code == 200


def test_a_server_that_ends_lets_answers_end(tagged):
    engine = ScriptedEngine(tagged)
    engine.says, engine.pause = lambda request: "low " * 40, 0.01
    with run_server(engine, tagged) as running:
        stream = begin(running, stream=True)
        running.wait_until(lambda: engine.num_steps > 2)
        running.stop()
        running.wait_until(lambda: running.service.draining)
        with running.http as http:
            response = http.post(CHAT, json=ASK)
            refused(response, 503)
            assert "retry-after" in response.headers
            refused(http.get("/health"), 503)
        assert b"[DONE]" in rest(stream)
        running.thread.join(10)
        assert not running.thread.is_alive() and running.service.error is None
        with pytest.raises(httpx.ConnectError):
            running.post(CHAT, ASK)


def test_a_server_that_ends_does_not_wait_for_ever(tagged):
    engine = ScriptedEngine(tagged)
    engine.says, engine.pause = lambda request: "low " * 500, 0.02
    with run_server(engine, tagged, drain_seconds=0.1) as running:
        stream = begin(running, stream=True)
        running.wait_until(lambda: engine.num_steps > 2)
        began = time.monotonic()
        running.stop()
        answer = rest(stream)
        assert b"the server ended" in answer and b"[DONE]" not in answer and time.monotonic() - began < 5
