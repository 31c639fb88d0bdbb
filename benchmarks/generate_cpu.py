"""Prefill and greedy decoding on CPU beside Hugging Face transformers on PyTorch.

    python benchmarks/generate_cpu.py

The peer decodes in a loop of its own forward passes, without the overhead of its `generate()`: its best setting. A
step of one row has to read all weights: `reads` is how often the cores could read them in its time.
"""

from __future__ import annotations

import functools
import time

from side_by_side import (
    SHAPE,
    Bar,
    compare,
    median_seconds,
    one_side,
    our_config,
    read_bandwidth,
    require,
    seconds_per_step,
    torch_model,
)

PREFILL, PROMPT, NEW = 512, 32, 96
BATCHES = (1, 8)


def ours(dtype: str) -> dict[str, float]:
    """The engine that `python -m infer generate` runs."""
    import jax
    import numpy as np

    from qwen_jax import model, sharding
    from qwen_jax.engine import Capacity, Engine

    config, mesh = our_config(param_dtype=dtype, dtype=dtype), sharding.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        params = model.unstack_layers(jax.jit(model.init, static_argnums=0)(config, jax.random.key(0)))
    capacity = Capacity(max_rows=max(BATCHES), max_length=PREFILL + NEW)
    engine = Engine(config, params, num_tokens=config.vocab_size, mesh=mesh, capacity=capacity)
    draw = np.random.default_rng(0).integers
    # Every prompt is another: what is known of one before is not computed again.
    prompts = lambda rows, length: draw(0, config.vocab_size, (rows, length)).tolist()
    figures = {"prefill": median_seconds(lambda: seconds_per_step(engine, prompts(1, PREFILL), 1), times=5, warm_up=2)}
    for rows in BATCHES:
        seconds_per_step(engine, prompts(rows, PROMPT), NEW)
        figures[f"decode{rows}"] = min(seconds_per_step(engine, prompts(rows, PROMPT), NEW) for _ in range(2))
    bandwidth, size = read_bandwidth(), sum(x.nbytes for x in jax.tree.leaves(params))
    return figures | {"bandwidth": bandwidth / 1e9, "reads": figures["decode1"] * bandwidth / size}


def theirs(dtype: str) -> dict[str, float]:
    import torch
    from transformers import DynamicCache

    net = torch_model(dtype).eval()

    @torch.inference_mode()
    def run(rows: int) -> float:
        ids, cache = torch.randint(0, SHAPE["vocab_size"], (rows, PROMPT)), DynamicCache()
        logits = net(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        start = time.perf_counter()
        for _ in range(NEW - 1):
            logits = net(logits[:, -1:].argmax(-1), past_key_values=cache, use_cache=True).logits
        return time.perf_counter() - start

    @torch.inference_mode()
    def prefill() -> None:
        ids = torch.randint(0, SHAPE["vocab_size"], (1, PREFILL))
        net(ids, use_cache=True, logits_to_keep=1).logits.argmax(-1)

    figures = {"prefill": median_seconds(prefill, times=5, warm_up=2)}
    for rows in BATCHES:
        run(rows)
        figures[f"decode{rows}"] = min(run(rows) for _ in range(2)) / (NEW - 1)
    return figures


SIDES = {
    f"{who} {dtype}": functools.partial(side, dtype)
    for dtype in ("float32", "bfloat16")
    for who, side in (("ours", ours), ("torch", theirs))
}


def bar(measure: str, dtype: str, goal: float, higher: bool) -> Bar:
    kind = "rate" if higher else "time"
    return Bar(f"{measure}_{dtype}_{kind}", [f"ours {dtype}"], [f"torch {dtype}"], measure, goal, higher)


BARS = [
    bar("prefill", "float32", 0.5, False),
    bar("prefill", "bfloat16", 1.0, False),
    *(bar(f"decode{rows}", "float32", 2.0, True) for rows in BATCHES),
    *(bar(f"decode{rows}", "bfloat16", 1.0, True) for rows in BATCHES),
    *(
        Bar(f"decode1_{dtype}_bandwidth", [f"ours {dtype}"], [], "reads", 0.6, higher_is_better=True)
        for dtype in ("float32", "bfloat16")
    ),
]

if __name__ == "__main__":
    one_side(SIDES)
    require("torch", "transformers")
    units = {"prefill": f"seconds for a prompt of {PREFILL} tokens, its first new token included"}
    units |= {f"decode{rows}": f"seconds per greedy step of {rows} rows after {PROMPT} tokens" for rows in BATCHES}
    units |= {"bandwidth": "GB/s of a big array, by all cores", "reads": "how often they read the weights in decode1"}
    raise SystemExit(compare(list(SIDES), BARS, rounds=2, units=units))
