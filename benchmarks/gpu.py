"""Training and decoding on one H100 or H200 beside Hugging Face transformers on PyTorch, for Qwen2.5-0.5B and 1.5B.

    python benchmarks/gpu.py

Training is a step of 4 rows of 2048: products in bfloat16, weights and AdamW's moments in float32. Decoding is greedy
after a prompt of 1024, weights in bfloat16. The peer runs compiled by torch.compile, with scaled-dot-product
attention: in training under autocast with fused AdamW, in decoding with a static cache and CUDA graphs.
"""

from __future__ import annotations

import functools
import subprocess
import time
from collections.abc import Mapping

from side_by_side import Bar, judge, measure, median_seconds, one_side, our_step_seconds, require, seconds_per_step

MODELS = ("Qwen2.5-0.5B", "Qwen2.5-1.5B")
ROWS, LENGTH, STEPS = 4, 2048, 10
PROMPT, NEW = 1024, 129
BATCHES = (1, 32)
# Dense bfloat16 operations and bytes of HBM per second, by the data sheets.
CHIPS = {"H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12)}


def ours_train(name: str) -> dict[str, float]:
    from train.config import Zoo

    return {"train": our_step_seconds(Zoo(name=name), rows=ROWS, length=LENGTH, steps=STEPS, warm_up=3)}


def theirs_train(name: str) -> dict[str, float]:
    import torch

    net = torch_model(name, "float32").train()
    compiled = torch.compile(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, net.config.vocab_size, (ROWS, LENGTH), device="cuda")

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = compiled(ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()

    return {"train": median_seconds(step, times=STEPS, warm_up=3)}


def ours_decode(name: str) -> dict[str, float]:
    """The engine that `python -m infer generate` runs."""
    import dataclasses

    import jax
    import numpy as np

    from qwen_jax import model, sharding, zoo
    from qwen_jax.engine import Capacity, Engine

    config = dataclasses.replace(zoo.published(name), param_dtype="bfloat16", dtype="bfloat16")
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        params = model.unstack_layers(jax.jit(model.init, static_argnums=0)(config, jax.random.key(0)))
    capacity = Capacity(max_rows=max(BATCHES), max_length=PROMPT + NEW)
    engine = Engine(config, params, num_tokens=config.vocab_size, mesh=mesh, capacity=capacity)

    def decode(rows: int) -> float:
        prompts = np.random.default_rng(0).integers(0, config.vocab_size, (rows, PROMPT)).tolist()
        return seconds_per_step(engine, prompts, NEW)

    # The first of each compiles.
    return {f"decode{rows}": min([decode(rows) for _ in range(3)][1:]) for rows in BATCHES}


def theirs_decode(name: str) -> dict[str, float]:
    import torch
    from transformers import StaticCache

    net = torch_model(name, "bfloat16").eval()

    @torch.inference_mode()
    def decode(rows: int) -> float:
        # One cache and one program for each number of rows: others would be recorded again in every call.
        torch.compiler.reset()
        step = torch.compile(net.forward, mode="reduce-overhead", fullgraph=True)
        cache = StaticCache(config=net.config, max_cache_len=PROMPT + NEW)
        return min([greedy(step, cache, rows) for _ in range(3)][1:])

    def greedy(step, cache, rows: int) -> float:
        cache.reset()
        ids = torch.randint(0, net.config.vocab_size, (rows, PROMPT), device="cuda")
        positions = [torch.full((rows, 1), p, device="cuda") for p in range(PROMPT, PROMPT + NEW - 1)]
        logits = net(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        torch.cuda.synchronize()
        start = time.perf_counter()
        for position in positions:
            torch.compiler.cudagraph_mark_step_begin()
            ids = logits[:, -1:].argmax(-1)
            logits = step(ids, position_ids=position, past_key_values=cache, use_cache=True).logits.clone()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / (NEW - 1)

    return {f"decode{rows}": decode(rows) for rows in BATCHES}


def torch_model(name: str, dtype: str):
    """The peer's model of a published shape, on the GPU."""
    import torch
    import transformers

    from qwen_jax import zoo
    from qwen_jax.weights import hf_config

    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    transformers.logging.set_verbosity_error()
    config = transformers.Qwen2Config(**hf_config.to_hf(zoo.published(name), "qwen2"), attn_implementation="sdpa")
    return transformers.Qwen2ForCausalLM(config).to("cuda", getattr(torch, dtype))


SIDES = {
    f"{who} {work} {name}": functools.partial(side, name)
    for name in MODELS
    for work, pair in {"train": (ours_train, theirs_train), "decode": (ours_decode, theirs_decode)}.items()
    for who, side in zip(("ours", "torch"), pair, strict=True)
}
UNITS = {"train": f"seconds per optimiser step of {ROWS} x {LENGTH} tokens, clipping included on both sides"} | {
    f"decode{rows}": f"seconds per greedy step of {rows} rows after {PROMPT} tokens" for rows in BATCHES
}


def bars(name: str) -> list[Bar]:
    """Ahead of the peer in training and in decoding."""
    decoding = [
        Bar(f"decode{rows}_{name}_rate", [f"ours decode {name}"], [f"torch decode {name}"], f"decode{rows}", 1.0, True)
        for rows in BATCHES
    ]
    return [Bar(f"train_{name}_time", [f"ours train {name}"], [f"torch train {name}"], "train", 1.0), *decoding]


def print_shares(gpu: str, best: Mapping[str, Mapping[str, float]]) -> None:
    """Prints what part of the GPU's peak each figure is: operations in training, bytes in decoding."""
    from qwen_jax import zoo
    from train.plan import formulas

    flops, bandwidth = next(peaks for chip, peaks in CHIPS.items() if chip in gpu)
    print(f"of {flops / 1e12:.0f} TFLOP/s (causal attention counted once) and {bandwidth / 1e12:.2f} TB/s, {gpu}\n")
    for side, figures in best.items():
        config = zoo.published(side.split()[-1])
        for name, seconds in figures.items():
            if name == "train":
                share = formulas.train_flops(config, LENGTH) * ROWS * LENGTH / seconds / flops
            else:
                # Every weight that multiplies, and the keys and values of each row, at the mean of its lengths.
                held = int(name.removeprefix("decode")) * (PROMPT + NEW / 2) * formulas.kv_bytes(config)
                share = (formulas.BF16 * formulas.matmul_parameters(config) + held) / seconds / bandwidth
            print(f"{side:28} {name:10} {share:6.1%}")
    print()


if __name__ == "__main__":
    one_side(SIDES)
    require("torch", "transformers")
    try:
        found = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True
        )
    except OSError:
        raise SystemExit("no NVIDIA GPU here (nvidia-smi is missing); this needs an H100 or H200") from None
    gpu = found.stdout.partition("\n")[0].strip()
    if not any(chip in gpu for chip in CHIPS):
        raise SystemExit(
            f"the GPU here is {gpu or 'none'}; this needs one of {', '.join(CHIPS)}, whose peaks are known"
        )
    best = measure(list(SIDES), rounds=2, units=UNITS, platform="cuda")
    print_shares(gpu, best)
    raise SystemExit(judge(best, [bar for name in MODELS for bar in bars(name)]))
