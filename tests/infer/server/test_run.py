"""`python -m infer serve`: what it refuses to begin with, and how it ends."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time

import httpx
import pytest

from infer.model import Opened
from tests.infer.server.conftest import ScriptedEngine
from tests.infer.server.test_service import CHAT

ASK = {"messages": [{"role": "user", "content": "low"}], "stream": True}


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_others_are_not_let_in_without_a_key(run_infer, host):
    code, _, err = run_infer("serve", "nothing", "--host", host)
    assert code == 2 and "give --api-key-file" in err


def test_keys_that_are_none(run_infer, tmp_path, monkeypatch):
    (tmp_path / "empty").write_text("\n")
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    for code, options, word in (
        (4, ("--api-key-file", tmp_path / "none"), "cannot read the key"),
        (2, ("--api-key-file", tmp_path / "empty"), "holds no key"),
        (2, ("--api-key-env", "NO_SUCH_KEY"), "NO_SUCH_KEY holds no key"),
        (2, ("--api-key", ""), "--api-key holds no key"),
        (2, ("--api-key", "a", "--api-key-env", "B"), "not allowed with"),
    ):
        found, _, err = run_infer("serve", "nothing", *options)
        assert found == code and word in err, err


def test_a_port_that_is_taken_is_told_before_the_model_is_read(run_infer):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, err = run_infer("serve", "nothing", "--port", taken.getsockname()[1])
    assert code == 2 and "cannot listen on 127.0.0.1" in err


@pytest.fixture
def served(run_infer, long_run, tagged, port, monkeypatch):
    """Serves a scripted engine in this thread while `meanwhile` runs in another; exit code, engine, stderr."""
    engine = ScriptedEngine(tagged)
    engine.says, engine.pause = lambda request: "low " * 30, 0.01
    monkeypatch.setattr(Opened, "load", lambda opened, capacity: engine)
    logger = logging.getLogger("uvicorn")
    state = logger.handlers[:], logger.level, logger.propagate

    def serve(meanwhile, *options):
        def wait_and_see():
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", verify=False, trust_env=False) as http:
                for _ in range(1000):
                    try:
                        http.get("/health")
                        break
                    except httpx.ConnectError:
                        time.sleep(0.01)
                meanwhile(engine, http)

        other = threading.Thread(target=wait_and_see)
        other.start()
        code, _, err = run_infer("serve", long_run, "--format", "qwen3", "--port", port, *options)
        other.join(10)
        return code, engine, err

    yield serve
    logger.handlers[:], logger.level, logger.propagate = state


def test_a_signal_lets_answers_end(served):
    lines = []

    def meanwhile(engine, http):
        assert http.get("/v1/models").json()["data"][0]["id"] == "mine"
        with http.stream("POST", CHAT, json=ASK) as response:
            os.kill(os.getpid(), signal.SIGTERM)
            lines.extend(response.iter_lines())

    code, engine, err = served(meanwhile, "--served-model-name", "mine")
    assert code == 0 and lines[-2:] == ["data: [DONE]", ""] and not engine.busy
    assert "infer: serving mine at http://127.0.0.1:" in err and f'"POST {CHAT} HTTP/1.1" 200' in err


def test_a_second_signal_does_not_wait(served, monkeypatch):
    left = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: (left.set(), codes.append(code)))
    codes = []

    def meanwhile(engine, http):
        engine.pause = 0.2
        with http.stream("POST", CHAT, json=ASK):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert left.wait(5)

    served(meanwhile)
    assert codes == [128 + signal.SIGTERM]


def test_an_engine_that_fails_is_the_exit_code(served):
    def meanwhile(engine, http):
        engine.fails = RuntimeError("out of memory")
        assert http.post(CHAT, json=ASK | {"stream": False}).status_code == 500

    code, _, err = served(meanwhile)
    assert code == 1 and "RuntimeError: out of memory" in err
