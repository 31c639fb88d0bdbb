"""A tiny model behind the server: what a row says depends on nothing beside it, and nothing is left behind."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from infer.config import parse
from infer.model import open_for
from qwen_jax.engine import Capacity
from tests.infer.server.conftest import run_server
from tests.infer.server.test_service import begin

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ROWS = 2


@pytest.fixture(scope="module")
def real(long_run):
    opened = open_for(parse(["serve", str(long_run), "--format", "qwen3"]))
    # Too few pages for both rows at once: one gives way, and is computed again.
    engine = opened.load(Capacity(max_rows=ROWS, max_length=112, cache_tokens=112, page_size=8, chunk=32))
    with run_server(engine, opened.tokenizer, room=64, patience=300) as running:
        yield running


def text(running, body):
    response = running.post(TEXT, body)
    assert response.status_code == 200, response.text
    return [choice["text"] for choice in response.json()["choices"]]


def metrics(running):
    with running.http as http:
        lines = http.get("/metrics").text.splitlines()
    return {line.split()[0]: float(line.split()[1]) for line in lines if not line.startswith("#")}


def test_a_request_is_answered_alike_alone_and_among_others(real):
    common = "low lower lowest newer newest wider " * 3
    bodies = [
        {"prompt": common + word, "max_tokens": 50, "seed": seed, "temperature": temperature, "n": n}
        for word in ("low", "wider")
        for seed, temperature, n in ((1, 1, 2), (2, 0.7, 1))
    ]
    alone = [text(real, body) for body in bodies]
    assert len({answer for answers in alone for answer in answers}) == len(sum(alone, []))
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda body: text(real, body), bodies * 2))
    assert together == alone * 2
    counts = metrics(real)
    assert counts["qwen_prefix_hit_tokens_total"] > 0 and counts["qwen_preemptions_total"] > 0
    assert counts["qwen_cache_pages"] == 14 and counts["qwen_rows_running"] == counts["qwen_cache_pages_used"] == 0
    assert counts["qwen_time_to_first_token_seconds_count"] == 3 * sum(map(len, alone))
    assert counts['qwen_requests_total{route="/v1/completions",status="200"}'] == 3 * len(bodies)


def test_nothing_is_left_of_who_went_away(real):
    generated = real.service._stats.generated_tokens
    for number in range(30):
        stream = number % 2 == 0
        connection = begin(real, stream=stream, max_tokens=80, temperature=1.0)
        if number % 3 == 1:
            real.wait_until(lambda: real.service._rows)
        elif number % 3 == 2 and stream:
            received = b""
            # An answer may end before.
            while received.count(b"data: ") < 10 and (more := connection.recv(4096)):
                received += more
        connection.close()
    real.wait_until(lambda: not real.service._jobs and not real.engine.busy, seconds=60)
    real.wait_until(lambda: real.service._stats.pages_used == real.service._num_rows == 0)
    assert not real.service._rows
    assert real.service._stats.generated_tokens - generated < 30 * 40  # half of what was asked for
