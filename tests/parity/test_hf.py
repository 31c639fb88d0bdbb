"""The models that `to_hf` describes, built by `transformers`, with their tensors laid out as the table says."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import model
from qwen_jax.config import DynamicNTK, Linear, Rope, Score, Yarn
from qwen_jax.ops.rope import frequencies
from qwen_jax.weights import hf, hf_config
from tests import paged
from tests.conftest import tiny_config
from tests.published import assert_close, logits_of_rows, tree_of

torch = pytest.importorskip("torch", reason="the oracle: pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers", reason="the oracle: pip install -e '.[parity]'")

pytestmark = pytest.mark.filterwarnings("default")

QWEN3 = dict(qkv_bias=False, qk_norm=True)
# Lengths of which the 16 tokens below are a multiple; the ramp of YaRN is in the middle of the pairs.
LINEAR, DYNAMIC = Linear(factor=2.5), DynamicNTK(factor=3.0, original_positions=6)
YARN = Yarn(factor=4.0, original_positions=6, beta_fast=0.5, beta_slow=0.01, attention_factor=1.3)
SCALED = {
    "qwen2 linear": tiny_config(rope=Rope(theta=12345.0, scaling=LINEAR)),
    "qwen2 yarn": tiny_config(rope=Rope(theta=12345.0, scaling=YARN)),
    "qwen3 dynamic": tiny_config(**QWEN3, rope=Rope(theta=12345.0, scaling=DYNAMIC), max_position=18),
}
MODELS = {
    "qwen2 tied": tiny_config(),
    "qwen2 untied": tiny_config(tie_embeddings=False, num_kv_heads=1, head_dim=8),
    "qwen2 windows": tiny_config(windows=(0, 5, 5)),
    "qwen2 odd windows": tiny_config(windows=(5, 0, 5)),
    "qwen2 score": tiny_config(score=Score(labels=5, hidden=False)),
    "qwen2 two labels": tiny_config(score=Score(labels=2, hidden=False), tie_embeddings=False),
    "qwen3 tied": tiny_config(**QWEN3),
    "qwen3 windows": tiny_config(**QWEN3, windows=(4, 4, 4), tie_embeddings=False),
    "qwen3 score": tiny_config(**QWEN3, score=Score(labels=1, hidden=False)),
    **SCALED,
}


@pytest.fixture(params=MODELS)
def config(request):
    return MODELS[request.param]


def oracle(config, folder):
    """A random model of the class and the values that our config.json names."""
    values = hf_config.to_hf(config, hf.model_type_of(config))
    (folder / "config.json").write_text(json.dumps(values))
    theirs = transformers.AutoConfig.from_pretrained(folder, attn_implementation="eager")
    torch.manual_seed(0)
    net = getattr(transformers, values["architectures"][0])(theirs)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net.eval()


def test_the_model_has_the_tensors_of_the_table_in_its_order(config, tmp_path):
    parameters = oracle(config, tmp_path).named_parameters()
    table = hf.table(config, hf.model_type_of(config))
    assert [(name, tuple(p.shape)) for name, p in parameters] == [(tensor.name, tensor.shape) for tensor in table]


def test_its_own_config_is_read_as_ours(config, tmp_path):
    net = oracle(config, tmp_path)
    net.config.architectures = [type(net).__name__]
    net.config.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    if config == MODELS["qwen2 odd windows"]:
        # transformers adds a max_window_layers that it does not follow.
        del values["max_window_layers"]
    assert hf_config.from_hf(values, where="config.json") == config


def test_it_computes_what_ours_computes(mesh, config, tmp_path):
    net = oracle(config, tmp_path)
    named = {name: p.detach().numpy() for name, p in net.named_parameters()}
    params = tree_of(config, hf.table(config, hf.model_type_of(config)), named)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 16)).astype(np.int32)
    positions = np.tile(np.arange(16, dtype=np.int32), (2, 1))
    hidden = jax.jit(model.forward, static_argnums=0)(config, params, tokens, positions)
    params = jax.tree.map(jnp.asarray, params)
    got = model.scores(config, params, hidden) if config.score else model.logits(params, hidden)
    with torch.no_grad():
        states = net.model(torch.tensor(tokens.astype(np.int64))).last_hidden_state
        expected = (net.score if config.score else net.lm_head)(states)
    assert_close(got, expected.numpy())


@pytest.mark.parametrize("name", SCALED)
def test_decoding_turns_keys_as_theirs_does(mesh, name, tmp_path):
    """One row at a time there; here both rows in one batch, padded to the longer."""
    config = SCALED[name]
    net = oracle(config, tmp_path)
    named = {name: p.detach().numpy() for name, p in net.named_parameters()}
    params = model.unstack_layers(tree_of(config, hf.table(config, hf.model_type_of(config)), named))
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 16)).astype(np.int32)
    lengths = np.array([4, 10], np.int32)  # within the original positions, from which it grows out, and beyond
    expected = []
    with torch.no_grad():
        for row, length in zip(torch.tensor(ids.astype(np.int64)), lengths, strict=True):
            net(row[None, :1])  # their dynamic scaling stays at the longest row it saw until it sees a short one
            steps, cache = [], None
            for piece in (row[None, :length], *(row[None, t : t + 1] for t in range(length, 16))):
                out = net(piece, past_key_values=cache, use_cache=True)
                steps.append(out.logits[0])
                cache = out.past_key_values
            expected.append(torch.cat(steps).numpy())

    rows = paged.paged(config, 2, 16, jnp.asarray(lengths))
    positions = np.tile(np.arange(10, dtype=np.int32), (2, 1))
    first = np.where(positions < lengths[:, None], ids[:, :10], 0)
    got, rows = logits_of_rows(config, params, first, positions, rows)
    for row, length in enumerate(lengths):
        assert_close(got[row, :length], expected[row][:length], f"prompt {row}")
    for step in range(6):
        at = lengths[:, None] + step
        got, rows = logits_of_rows(config, params, np.take_along_axis(ids, at, axis=1), at, rows)
        assert_close(got[:, 0], np.stack([expected[row][at[row, 0]] for row in (0, 1)]), f"step {step}")


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("theta", "original", "factor"), [(1e6, 32768, 4.0), (1e4, 2048, 1.0), (5e6, 300, 40.5)])
def test_yarn_of_a_published_file_is_theirs(head_dim, theta, original, factor):
    values = hf_config.to_hf(tiny_config(head_dim=head_dim), "qwen2") | {
        "rope_theta": theta,
        # With the extended length here, which some releases divide by the original one to have the factor.
        "max_position_embeddings": int(factor * original),
        "rope_scaling": {"type": "yarn", "factor": factor, "original_max_position_embeddings": original},
    }
    config = hf_config.from_hf(values, where="config.json")
    kind = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["yarn"]
    theirs, attention_factor = kind(transformers.Qwen2Config(**values), "cpu")
    ours = frequencies(config.rope, jnp.zeros((1, 1), jnp.int32), None, head_dim=head_dim)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)
    assert config.rope.scaling.attention_factor == pytest.approx(attention_factor, rel=1e-9)
    assert config.max_position == int(factor * original)
