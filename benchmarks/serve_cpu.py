"""Many requests at once on CPU beside Hugging Face transformers on PyTorch: rate, first tokens, memory.

    python benchmarks/serve_cpu.py

64 requests arrive together: prompts of 16 to 384 tokens (half of them begin with the same 64, as chats do), 16 to 256
new ones each, greedy, whatever is made. The peer runs its continuous batching in its best settings, and `generate()`
on batches that are sorted by the length of the prompt. Both sides read the same weights from one published folder.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from side_by_side import SHAPE, THREADS, Bar, judge, measure, one_side, require, torch_model

RUNS = Path("runs/serve_cpu")
MODEL = RUNS / "model"
LAYERS = 6  # of the model of the benchmarks: 119 million parameters
REQUESTS, SYSTEM = 64, 64
CACHE_TOKENS, PAGE, MAX_LENGTH = 16384, 32, 640

Prompts = Sequence[tuple[list[int], int]]  # and how many tokens are to follow each
Tokens = dict[int, list[tuple[int, float]]]  # of each request, with the times they were made at


def requests(seed: int) -> Prompts:
    """The lengths are always the same; what the prompts hold is another with every seed."""
    sizes, ids = np.random.default_rng(0), np.random.default_rng(seed)
    draw = lambda count: ids.integers(0, SHAPE["vocab_size"], count).tolist()
    length = lambda middle, least, most: int(np.clip(sizes.lognormal(np.log(middle), 0.7), least, most))
    system, made = draw(SYSTEM), []
    for number in range(REQUESTS):
        start = system if number % 2 else []
        made.append((start + draw(max(length(96, 16, 384) - len(start), 16)), length(72, 16, 256)))
    return made


def ours(dtype: str) -> dict[str, float]:
    """The engine that `python -m infer serve` runs."""
    import jax

    from qwen_jax import sharding
    from qwen_jax.engine import Capacity, Engine, Request, Sampling
    from qwen_jax.weights.load import load_params
    from qwen_jax.weights.source import open_model

    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh), open_model(MODEL) as source:
        params = load_params(source, dtype=dtype, stacked=False)
        config = dataclasses.replace(source.config, dtype=dtype, param_dtype=dtype)
    capacity = Capacity(max_rows=REQUESTS, max_length=MAX_LENGTH, cache_tokens=CACHE_TOKENS, page_size=PAGE)
    engine = Engine(config, params, num_tokens=config.vocab_size, mesh=mesh, capacity=capacity)
    pages = 0

    def run(asked: Prompts) -> Tokens:
        nonlocal pages
        add = lambda prompt, new: Request(prompt=prompt, max_new_tokens=new, sampling=Sampling(temperature=0))
        numbers = {engine.add(add(*request)): index for index, request in enumerate(asked)}
        made: Tokens = {index: [] for index in numbers.values()}
        while engine.busy:
            tokens, now = engine.step(), time.perf_counter()
            pages = max(pages, engine.stats.pages_used)
            for token in tokens:
                made[numbers[token.request]].append((token.id, now))
        return made

    run(requests(1))  # compiles all that the same lengths will need again
    figures = figures_of(run, f"ours {dtype}")
    size = 2 * config.num_layers * config.num_kv_heads * config.head_dim * np.dtype(params["embed"]["w"].dtype).itemsize
    return figures | {"pages": pages / engine.stats.pages_total, "cache": pages * PAGE * size / 1e6}


def continuous(dtype: str, rows: int) -> dict[str, float]:
    """Its continuous batching of at most `rows` requests; eager attention, and other budgets, are no faster."""
    import transformers

    net = their_model(dtype)
    how = transformers.ContinuousBatchingConfig(
        page_size=PAGE, num_blocks=CACHE_TOKENS // PAGE, max_batch_tokens=512, max_requests_per_batch=rows
    )
    greedy = transformers.GenerationConfig(do_sample=False, eos_token_id=-1)

    def run(asked: Prompts) -> Tokens:
        made: Tokens = {}
        with net.continuous_batching_context_manager(greedy, continuous_batching_config=how) as manager:
            add = functools.partial(manager.add_request, record_timestamps=True)
            numbers = {add(prompt, max_new_tokens=new): index for index, (prompt, new) in enumerate(asked)}
            while len(made) < len(asked):
                found = manager.get_result(timeout=1)
                if found is not None and found.is_finished():
                    assert found.error is None, found.error
                    made[numbers[found.request_id]] = list(zip(found.generated_tokens, found.timestamps, strict=True))
                assert found is not None or manager.is_running()
        return made

    run(requests(1)[:4])
    return figures_of(run, f"continuous {rows} {dtype}")


def generate(dtype: str, rows: int) -> dict[str, float]:
    """Its `generate()` on batches of `rows` requests of similar prompts, each until its longest has all its tokens."""
    import torch

    net = their_model(dtype)

    def run(asked: Prompts) -> Tokens:
        made: Tokens = {}
        order = sorted(range(len(asked)), key=lambda index: len(asked[index][0]))
        for batch in (order[start : start + rows] for start in range(0, len(order), rows)):
            width = max(len(asked[index][0]) for index in batch)
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            mask, times = torch.zeros_like(ids), []
            for row, prompt in enumerate(asked[index][0] for index in batch):
                ids[row, width - len(prompt) :] = torch.tensor(prompt)
                mask[row, width - len(prompt) :] = 1

            def clock(ids, scores, times=times, **_):
                times.append(time.perf_counter())
                return torch.zeros(len(ids), dtype=torch.bool)

            new = max(asked[index][1] for index in batch)
            out = net.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=new,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                stopping_criteria=[clock],
            )
            for row, index in enumerate(batch):
                made[index] = list(zip(out[row, width:].tolist(), times, strict=True))[: asked[index][1]]
        return made

    run([(prompt, 4) for prompt, _ in requests(1)[:4]])
    return figures_of(run, f"generate {dtype}")


def their_model(dtype: str) -> Any:
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    transformers.logging.set_verbosity_error()
    net = transformers.AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    )
    return net.eval()


def figures_of(run: Callable[[Prompts], Tokens], name: str) -> dict[str, float]:
    """What comes of the requests that are measured; their tokens are left in a file of this name."""
    asked, start, processor = requests(0), time.perf_counter(), time.process_time()
    made = run(asked)
    processor = time.process_time() - processor
    count = sum(map(len, made.values()))
    assert count == sum(new for _, new in asked)
    ids = [[token for token, _ in made[index]] for index in range(len(asked))]
    (RUNS / f"{name}.json").write_text(json.dumps(ids))
    return {
        "token": (max(row[-1][1] for row in made.values()) - start) / count * 1e3,
        "first": statistics.median(row[0][1] for row in made.values()) - start,
        "processor": processor,
    }


def differing(one: str, other: str) -> float:
    """The share of requests that got other tokens."""
    a, b = (json.loads((RUNS / f"{name}.json").read_text()) for name in (one, other))
    return sum(x != y for x, y in zip(a, b, strict=True)) / len(a)


SIDES = {
    "ours float32": functools.partial(ours, "float32"),
    "continuous 64 float32": functools.partial(continuous, "float32", REQUESTS),
    "continuous 16 float32": functools.partial(continuous, "float32", 16),
    "generate float32": functools.partial(generate, "float32", 32),
    "ours bfloat16": functools.partial(ours, "bfloat16"),
    "continuous 64 bfloat16": functools.partial(continuous, "bfloat16", REQUESTS),
    "generate bfloat16": functools.partial(generate, "bfloat16", 32),
}
BARS: list[Bar] = []
for _dtype in ("float32", "bfloat16"):
    _theirs = [side for side in SIDES if side.endswith(_dtype) and not side.startswith("ours")]
    BARS += [
        Bar(f"serve_{_dtype}_rate", [f"ours {_dtype}"], _theirs, "token", 2.5, higher_is_better=True),
        Bar(f"serve_{_dtype}_first_token_time", [f"ours {_dtype}"], _theirs, "first", 1.0),
        Bar(f"serve_{_dtype}_pages", [f"ours {_dtype}"], [], "pages", 1.0),
    ]
# Where two logits are as good as equal, the sums of one side may turn them round.
BARS += [Bar("serve_float32_other_tokens", ["ours float32"], [], "other", 0.05)]

if __name__ == "__main__":
    one_side(SIDES)
    require("torch", "transformers")
    if not MODEL.exists():
        torch_model("float32", num_layers=LAYERS).save_pretrained(MODEL)
    units = {
        "token": "milliseconds per token, all requests together",
        "first": "median of the seconds to a request's first token",
        "processor": "seconds of all cores together, which a busy machine changes least",
        "pages": f"the most pages that were in use, of those for {CACHE_TOKENS} tokens",
        "cache": "the same in MB",
    }
    best = measure(list(SIDES), rounds=1, units=units)
    best["ours float32"]["other"] = differing("ours float32", "continuous 64 float32")
    raise SystemExit(judge(best, BARS))
