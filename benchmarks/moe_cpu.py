"""One training step of a mixture of experts on CPU beside transformers: forward, backward and AdamW, 2 rows of 512.

    python benchmarks/moe_cpu.py

Both sides have the same model, so the same active parameters: 32 experts of which 4 see a token, and a shared one. The
peer runs its loop over experts ("eager") and its grouped product; its third way copies an expert's weights for every
choice of every token, 10 GB here. Ours is also measured with one MLP as wide as what a token sees: the same work
without experts.
"""

from __future__ import annotations

import dataclasses
import functools

from side_by_side import (
    THREADS,
    Bar,
    compare,
    one_side,
    our_config,
    our_step_seconds,
    require,
    torch_step_seconds,
)

ROWS, LENGTH, STEPS = 2, 512, 3
SHAPE = dict(width=512, num_heads=8, num_kv_heads=2, num_layers=4, vocab_size=8192)
EXPERTS = dict(num_experts=32, top_k=4, expert_width=384, shared_width=1536, normalize_top_k=False)
ACTIVE_WIDTH = EXPERTS["top_k"] * EXPERTS["expert_width"] + EXPERTS["shared_width"]


def ours(*, experts: bool) -> dict[str, float]:
    from qwen_jax.config import Moe

    of_part = dict(moe=Moe(**EXPERTS), mlp_width=0) if experts else dict(mlp_width=ACTIVE_WIDTH)
    head_dim = SHAPE["width"] // SHAPE["num_heads"]
    model = dataclasses.replace(
        our_config(param_dtype="float32", dtype="float32"), **SHAPE, head_dim=head_dim, **of_part
    )
    return {"step": our_step_seconds(model, rows=ROWS, length=LENGTH, steps=STEPS, warm_up=1)}


def theirs(experts_implementation: str) -> dict[str, float]:
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    config = transformers.Qwen2MoeConfig(
        hidden_size=SHAPE["width"],
        num_attention_heads=SHAPE["num_heads"],
        num_key_value_heads=SHAPE["num_kv_heads"],
        num_hidden_layers=SHAPE["num_layers"],
        vocab_size=SHAPE["vocab_size"],
        num_experts=EXPERTS["num_experts"],
        num_experts_per_tok=EXPERTS["top_k"],
        moe_intermediate_size=EXPERTS["expert_width"],
        shared_expert_intermediate_size=EXPERTS["shared_width"],
        norm_topk_prob=EXPERTS["normalize_top_k"],
        decoder_sparse_step=1,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
    )
    net = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="sdpa", experts_implementation=experts_implementation
    ).train()
    assert net.config._experts_implementation == experts_implementation
    return {"step": torch_step_seconds(net, rows=ROWS, length=LENGTH, steps=STEPS)}


PEERS = ("eager", "grouped_mm")
SIDES = {
    "ours": functools.partial(ours, experts=True),
    "ours, one MLP": functools.partial(ours, experts=False),
    **{f"torch {name}": functools.partial(theirs, name) for name in PEERS},
}
BARS = [
    Bar("moe_step_time_beside_the_loop", ["ours"], ["torch eager"], "step", 1.0),
    Bar("moe_step_time_beside_the_best", ["ours"], [f"torch {name}" for name in PEERS], "step", 1.0),
]

if __name__ == "__main__":
    one_side(SIDES)
    require("torch", "transformers")
    units = {"step": f"seconds per optimiser step of {ROWS} x {LENGTH} tokens, clipping included on both sides"}
    raise SystemExit(compare(list(SIDES), BARS, rounds=2, units=units))
