"""Rows that go by their own length: a batch of short and long prompts is what each is alone."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from qwen_jax import sharding
from qwen_jax.config import DynamicNTK, QwenNTK, Rope
from qwen_jax.engine import decode
from tests.engine.test_decode import GREEDY, ROUNDING, make_engine, tokens_of

TRAINED = 16
QWEN1 = dict(
    rope=Rope(theta=1e4, scaling=QwenNTK(original_positions=TRAINED)), logn=TRAINED, windows=(9, 0), num_layers=2,
    num_kv_heads=4,
)  # fmt: skip
DYNAMIC = dict(rope=Rope(theta=1e4, scaling=DynamicNTK(factor=2.0, original_positions=TRAINED)))
# Half the training length, one and a half times, five times; the first goes past it, past twice and four times of it.
PROMPTS = [np.random.default_rng(n).integers(0, 90, n).tolist() for n in (TRAINED // 2, 3 * TRAINED // 2, 5 * TRAINED)]
COUNT = 4 * TRAINED


@pytest.fixture
def decoded(monkeypatch):
    """Decodes, and gives the tokens and the logits [B, COUNT, V] that they were chosen from."""
    seen, sample = [], decode.sample

    def recording(logits, *args, **kwargs):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), logits)
        return sample(logits, *args, **kwargs)

    monkeypatch.setattr(decode, "sample", recording)

    def run(engine, prompts):
        seen.clear()
        tokens = tokens_of(engine, prompts, GREEDY, count=COUNT)
        jax.effects_barrier()
        return tokens, np.stack(seen, axis=1)[: len(prompts)]

    return run


@pytest.mark.parametrize("changes", [QWEN1, DYNAMIC], ids=["qwen1", "dynamic"])
def test_a_batch_of_lengths_is_what_single_runs_give(decoded, changes):
    changes = changes | dict(max_position=8 * TRAINED + 32)
    tokens, logits = decoded(make_engine(**changes), PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        alone, alone_logits = decoded(make_engine(**changes), [prompt])
        assert alone == [tokens[row]]
        np.testing.assert_allclose(alone_logits[0], logits[row], **ROUNDING)


def test_rows_split_over_devices_keep_their_lengths():
    changes = QWEN1 | dict(max_position=8 * TRAINED + 32)
    mesh = sharding.make_mesh(data=2, tensor=2, devices=jax.devices()[:4])
    made = [tokens_of(make_engine(mesh, **changes), PROMPTS, GREEDY, count=4) for mesh in (mesh, None)]
    assert made[0] == made[1]
