"""A server under load: many clients at once, some of which leave early or ask for what cannot be had.

    python benchmarks/serve_load.py [MODEL] [--clients 200] [--seconds 60] [-- OPTIONS OF infer serve]

Everything stays on this machine: `python -m infer serve MODEL` runs on 127.0.0.1, and clients beside it. Without a
MODEL it is a small one with random weights. Every answer that comes whole is compared with what the server says to the
same request alone.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import dataclasses
import json
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Requests that are asked again and again, greedy or with a seed.
_KINDS = 48
_BAD = (
    ("/v1/completions", {"prompt": "x", "temperature": -1}, 400),
    ("/v1/completions", {"prompt": "x", "max_tokens": 10**9}, 400),
    ("/v1/completions", {"prompt": "x " * 10**5}, 400),
    ("/v1/completions", {"prompt": "x" * 9 * 10**6}, 413),
    ("/v1/completions", {"prompt": "x", "model": "other\n"}, 404),
    ("/v1/chat/completions", {"messages": "x"}, 400),
    ("/v1/admin", {}, 404),
)


@dataclasses.dataclass
class Tally:
    """What became of the requests."""

    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    first: list[float] = dataclasses.field(default_factory=list)
    between: list[float] = dataclasses.field(default_factory=list)
    tokens: int = 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    given, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as free:
        model, port = given.model or str(small_model(Path(folder))), free.getsockname()[1]
        free.close()
        command = [sys.executable, "-m", "infer", "serve", model, "--port", str(port), "--served-model-name", "it"]
        server = subprocess.Popen(
            [*command, *[option for option in options if option != "--"]], stderr=subprocess.DEVNULL
        )
        try:
            return asyncio.run(load(port, server, given.clients, given.seconds))
        finally:
            server.terminate()
            server.wait(60)


def small_model(folder: Path) -> Path:
    """A run folder with random weights, whose tokenizer knows bytes and little more."""
    import jax
    import numpy as np

    from qwen_jax import model, sharding, zoo
    from qwen_jax.text import train_bpe
    from qwen_jax.weights.checkpoint import Checkpoints

    tokenizer = train_bpe([Path(__file__).read_text()], vocab_size=512)
    shape = dict(num_layers=2, width=128, num_heads=4, num_kv_heads=2, head_dim=32, mlp_width=256, vocab_size=512)
    config = dataclasses.replace(zoo.published("Qwen2.5-0.5B"), **shape, param_dtype="float32", dtype="float32")
    draw = np.random.default_rng(0).normal
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        params = jax.tree.map(lambda x: jax.device_put(draw(0, 0.1, x.shape).astype(x.dtype)), model.abstract(config))
        checkpoints = Checkpoints(folder / "checkpoints", warn=print)
        files = {"model.json": config.to_json().encode(), "tokenizer.json": tokenizer.to_bytes(), "config.gin": b""}
        checkpoints.save(0, params=params, files=files, meta={})
        checkpoints.wait()
    return folder


async def load(port: int, server: subprocess.Popen, clients: int, seconds: float) -> int:
    """Puts the load on, prints what came of it; the exit code."""
    while server.poll() is None and (await ask(port, "/health", None))[0] != 200:
        await asyncio.sleep(0.2)
    requests = [request(random.Random(number), number) for number in range(_KINDS)]
    alone = [(await ask(port, "/v1/completions", body))[1] for body in requests]
    # Once more, all together: after that nothing is compiled, and memory is what it will be.
    await asyncio.gather(*(ask(port, "/v1/completions", body) for body in requests))
    before, tally, end = memory(server.pid), Tally(), time.monotonic() + seconds
    await asyncio.gather(*(client(port, number, requests, alone, tally, end) for number in range(clients)))
    await asyncio.sleep(1)
    metrics = (await ask(port, "/metrics", None))[1]
    left = {name: int(float(re.search(rf"^{name} (\S+)$", metrics, re.M)[1])) for name in (
        "qwen_rows_running", "qwen_rows_waiting", "qwen_cache_pages_used"
    )}  # fmt: skip
    return report(tally, seconds, clients, before, memory(server.pid), left)


def request(draw: random.Random, number: int) -> dict[str, object]:
    """One of the requests: some begin alike, as chats do."""
    prompt = "".join(draw.choices("abcdefgh \n", k=draw.randrange(5, 300)))
    prompt = "def f(x):\n    return x + 1\n" * (number % 3 * 3) + f"{number}: {prompt}"
    return dict(prompt=prompt, max_tokens=draw.randrange(8, 64), temperature=number % 2, seed=number, stream=True)


async def client(port: int, number: int, requests: list, alone: list[str], tally: Tally, end: float) -> None:
    """Asks one request after another, waits for the answer or leaves."""
    draw = random.Random(number)
    while time.monotonic() < end:
        if draw.random() < 0.1:
            path, body, status = draw.choice(_BAD)
            found, error, _ = await ask(port, path, body)
            good = found in (status, 429) and is_error(error)
            tally.counts["refused" if good else "refused otherwise"] += 1
            continue
        kind = draw.randrange(_KINDS)
        leaves = draw.random() * 2 if draw.random() < 0.2 else None
        try:
            async with asyncio.timeout(leaves):
                status, text, times = await ask(port, "/v1/completions", requests[kind])
        except TimeoutError:
            tally.counts["left"] += 1
            continue
        if status == 429:
            tally.counts["told to come later" if is_error(text) else "refused otherwise"] += 1
            await asyncio.sleep(draw.random())
        elif status != 200 or times is None:
            tally.counts["lost"] += 1
        else:
            tally.counts["whole" if text == alone[kind] else "mixed up" if text in alone else "differs"] += 1
            tally.first.append(times[1] - times[0])
            tally.between += [later - sooner for sooner, later in zip(times[1:], times[2:], strict=False)]
            tally.tokens += len(times) - 1


async def ask(port: int, path: str, body: dict | None) -> tuple[int, str, list[float] | None]:
    """Status and text of an answer; of a stream that came whole the times of its beginning and its pieces, too."""
    times = [time.monotonic()]
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
    except ConnectionRefusedError:
        return 0, "", None
    try:
        data = json.dumps(body).encode() if body is not None else b""
        lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", "Host: localhost", "Connection: close"]
        lines += ["Content-Type: application/json", f"Content-Length: {len(data)}", "", ""]
        writer.write("\r\n".join(lines).encode() + data)
        status = int((await reader.readline()).split()[1])
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        if b"text/event-stream" not in head:
            return status, (await reader.read()).decode(), None
        text, whole = "", False
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                times.append(time.monotonic())
                chunk = json.loads(line[6:])
                text += chunk["choices"][0]["text"] if "choices" in chunk else ""
            whole |= line.startswith(b"data: [DONE]")
        return status, text, times if whole else None
    except (ConnectionError, asyncio.IncompleteReadError, IndexError):
        return 0, "", None
    finally:
        writer.close()


def is_error(text: str) -> bool:
    """Whether a refusal has OpenAI's shape."""
    try:
        return json.loads(text)["error"].keys() == {"message", "type", "param", "code"}
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def memory(process: int) -> int:
    """MiB that a process has in memory."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process}/status").read_text())[1]) // 1024


def report(tally: Tally, seconds: float, clients: int, before: int, after: int, left: dict[str, int]) -> int:
    counts = tally.counts
    print(f"{clients} clients for {seconds:g} s: {tally.tokens / seconds:.0f} tokens/s in answers that came whole\n")
    for name, count in counts.most_common():
        print(f"{name.ljust(24)} {count:8}")
    for name, values in (("to the first token", tally.first), ("between tokens", tally.between)):
        ordered = sorted(values) or [float("nan")]
        at = [ordered[int(len(ordered) * part)] for part in (0.5, 0.99)]
        print(f"{name.ljust(24)} p50 {at[0] * 1000:.0f} ms, p99 {at[1] * 1000:.0f} ms")
    print(f"{'memory':24} {before} MiB before, {after} MiB after\n")
    bad = {name: counts[name] for name in ("lost", "mixed up", "differs", "refused otherwise")} | left
    for name, count in bad.items():
        print(f"BAR {name.replace(' ', '_')} {count} 0 {'ok' if count == 0 else 'SHORT'}")
    return int(any(bad.values()) or not counts["whole"])


if __name__ == "__main__":
    sys.exit(main())
