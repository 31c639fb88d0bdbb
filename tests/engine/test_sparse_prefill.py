"""Sparse prefill through the engine: who gets it, and that nobody else notices."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from qwen_jax.engine import VerticalSlash, decode
from tests.engine.test_decode import GREEDY, ROUNDING, make_engine, tokens_of

LEAST = VerticalSlash(threshold=64, vertical=130, slash=100)
SHORT, MIDDLE, LONG = (np.random.default_rng(n).integers(0, 90, n).tolist() for n in (64, 200, 400))


@pytest.fixture
def prefilled(monkeypatch):
    """The logits [B, V] after prompts."""
    seen, sample = [], decode.sample

    def recording(logits, *args, **kwargs):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), logits)
        return sample(logits, *args, **kwargs)

    monkeypatch.setattr(decode, "sample", recording)

    def run(prompts, sparse, count=1):
        engine = make_engine(max_position=600)
        engine = decode.Engine(engine.config, engine._params, num_tokens=90, mesh=engine.mesh, sparse=sparse)
        seen.clear()
        tokens_of(engine, prompts, GREEDY, count=count)
        jax.effects_barrier()
        return seen[0]

    return run


def test_only_rows_above_the_threshold_change_and_none_by_the_rows_beside_it(prefilled):
    prompts = [SHORT, MIDDLE, LONG]
    full, sparse = prefilled(prompts, None), prefilled(prompts, LEAST, count=2)
    np.testing.assert_allclose(sparse[0], full[0], **ROUNDING)
    assert (np.abs(sparse - full)[1:3].max(axis=1) > 100 * ROUNDING["atol"]).all()
    # Alone, in a cache of half the slots.
    np.testing.assert_allclose(prefilled([MIDDLE], LEAST)[0], sparse[1], **ROUNDING)
