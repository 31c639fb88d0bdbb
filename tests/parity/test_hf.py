"""The models that `to_hf` describes, built by `transformers`, with their tensors laid out as the table says."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from qwen_jax import model
from qwen_jax.config import Score
from qwen_jax.weights import hf, hf_config
from tests.conftest import tiny_config
from tests.published import assert_close, tree_of

torch = pytest.importorskip("torch", reason="the oracle: pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers", reason="the oracle: pip install -e '.[parity]'")

pytestmark = pytest.mark.filterwarnings("default")

QWEN3 = dict(qkv_bias=False, qk_norm=True)
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
    hidden, _ = jax.jit(model.forward, static_argnums=0)(config, params, tokens, positions)
    got = model.scores(config, params, hidden) if config.score else model.logits(params, hidden)
    with torch.no_grad():
        states = net.model(torch.tensor(tokens.astype(np.int64))).last_hidden_state
        expected = (net.score if config.score else net.lm_head)(states)
    assert_close(got, expected.numpy())
