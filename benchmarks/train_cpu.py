"""One training step on CPU beside Hugging Face transformers on PyTorch: forward, backward and AdamW, 2 rows of 512.

    python benchmarks/train_cpu.py

The peer runs in its best setting of each kind: fused AdamW, scaled-dot-product attention; for bfloat16 both bfloat16
weights and float32 weights under autocast, of which the faster counts. Ours keeps float32 weights and multiplies in
bfloat16.
"""

from __future__ import annotations

import functools

from side_by_side import (
    Bar,
    compare,
    one_side,
    our_config,
    our_step_seconds,
    require,
    torch_model,
    torch_step_seconds,
)

ROWS, LENGTH, STEPS = 2, 512, 4


def ours(dtype: str) -> dict[str, float]:
    model = our_config(param_dtype="float32", dtype=dtype)
    return {"step": our_step_seconds(model, rows=ROWS, length=LENGTH, steps=STEPS, warm_up=1)}


def theirs(dtype: str, autocast: bool) -> dict[str, float]:
    net = torch_model(dtype).train()
    return {"step": torch_step_seconds(net, rows=ROWS, length=LENGTH, steps=STEPS, autocast=autocast)}


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
