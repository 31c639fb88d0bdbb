"""One training step on CPU beside Hugging Face transformers on PyTorch: forward, backward and AdamW, 2 rows of 512.

    python benchmarks/train_cpu.py

The peer runs in its best setting of each kind: fused AdamW, scaled-dot-product attention; for bfloat16 both bfloat16
weights and float32 weights under autocast, of which the faster counts. Ours keeps float32 weights and multiplies in
bfloat16.
"""

from __future__ import annotations

import functools

from side_by_side import (
    SHAPE,
    Bar,
    compare,
    median_seconds,
    one_side,
    our_config,
    our_step_seconds,
    require,
    torch_model,
)

ROWS, LENGTH, STEPS = 2, 512, 4


def ours(dtype: str) -> dict[str, float]:
    model = our_config(param_dtype="float32", dtype=dtype)
    return {"step": our_step_seconds(model, rows=ROWS, length=LENGTH, steps=STEPS, warm_up=1)}


def theirs(dtype: str, autocast: bool) -> dict[str, float]:
    import torch

    net = torch_model(dtype).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, SHAPE["vocab_size"], (ROWS, LENGTH))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = net(ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return {"step": median_seconds(step, times=STEPS)}


SIDES = {
    "ours float32": functools.partial(ours, "float32"),
    "torch float32": functools.partial(theirs, "float32", False),
    "ours bfloat16": functools.partial(ours, "bfloat16"),
    "torch bfloat16": functools.partial(theirs, "bfloat16", False),
    "torch autocast": functools.partial(theirs, "float32", True),
}
BARS = [
    Bar("train_float32_time", ["ours float32"], ["torch float32"], "step", 0.65),
    Bar("train_bfloat16_time", ["ours bfloat16"], ["torch bfloat16", "torch autocast"], "step", 1.0),
]

if __name__ == "__main__":
    one_side(SIDES)
    require("torch", "transformers")
    units = {"step": f"seconds per optimiser step of {ROWS} x {LENGTH} tokens, clipping included on both sides"}
    raise SystemExit(compare(list(SIDES), BARS, rounds=2, units=units))
