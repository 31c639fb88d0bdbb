"""Published models as the `transformers` library computes them, opened here and opened there again after export.

Tiny random models with every field at an unusual value; weights go through files both ways.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import model
from qwen_jax.ops.loss import chunked_cross_entropy
from qwen_jax.weights import hf
from qwen_jax.weights.convert import convert
from qwen_jax.weights.load import load_params
from qwen_jax.weights.source import open_model
from qwen_jax.weights.verify import main as verify
from tests.published import tiny_tokenizer

torch = pytest.importorskip("torch", reason="the oracle: pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers", reason="the oracle: pip install -e '.[parity]'")

pytestmark = pytest.mark.filterwarnings("default")

# Of the largest value: float32 on both sides, sums in another order, some layers deep.
RELATIVE = 1e-5

COMMON = dict(
    vocab_size=288, hidden_size=40, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=14,
    intermediate_size=44, rms_norm_eps=3e-5, rope_theta=12345.0, max_position_embeddings=64, initializer_range=0.2,
    attn_implementation="eager",
)  # fmt: skip
MODELS = {
    "qwen2 tied": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen2 untied": ("Qwen2", dict(tie_word_embeddings=False, num_key_value_heads=1)),
    "qwen2 without groups": ("Qwen2", dict(tie_word_embeddings=False, num_key_value_heads=4, head_dim=None)),
    "qwen2 windows": (
        "Qwen2",
        dict(tie_word_embeddings=True, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    ),
    "qwen3": ("Qwen3", dict(tie_word_embeddings=False)),
    "qwen3 tied": ("Qwen3", dict(tie_word_embeddings=True, num_key_value_heads=4)),
}


@pytest.fixture(params=MODELS)
def published(request, tmp_path):
    """A folder that transformers saved, and the model it saved."""
    name, changes = MODELS[request.param]
    fields = {key: value for key, value in (COMMON | changes).items() if value is not None}
    torch.manual_seed(0)
    net = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**fields))
    with torch.no_grad():
        for parameter in net.parameters():  # biases and norms too
            parameter.add_(0.1 * torch.randn_like(parameter))
    net.save_pretrained(tmp_path / "published")
    (tmp_path / "published/tokenizer.json").write_bytes(tiny_tokenizer().to_bytes())
    return tmp_path / "published", net.eval()


def assert_close(got, want, name=""):
    got, want = np.asarray(got), np.asarray(want)
    assert np.abs(got - want).max() <= RELATIVE * np.abs(want).max(), name


@functools.partial(jax.jit, static_argnums=0)
def logits(config, params, tokens, positions, **cache):
    hidden, cache = model.forward(config, params, tokens, positions, **cache)
    return model.logits(params, hidden), cache


def tokens_of(config, length=17):
    return np.random.default_rng(0).integers(0, config.vocab_size, (2, length))


def tree_of(opened, named):
    """Arrays under published names as the stacked tree of parameters."""
    tree = jax.tree.map(lambda like: np.zeros(like.shape, np.float32), model.abstract(opened.config))
    for tensor in opened.table:
        for part, rows in zip(tensor.parts, tensor.rows, strict=True):
            node = tree
            for key in part.path.split("/"):
                node = node[key]
            node[() if part.layer is None else part.layer] = named[tensor.name][rows].reshape(part.shape)
    return tree


def test_logits_and_gradients(mesh, published):
    folder, net = published
    opened = open_model(folder)
    config, params = opened.config, load_params(opened, dtype="float32", stacked=True)
    ids = tokens_of(config)
    tokens, targets = ids[:, :-1].astype(np.int32), ids[:, 1:].astype(np.int32)
    positions = np.tile(np.arange(16, dtype=np.int32), (2, 1))

    expected = net(torch.tensor(ids[:, :-1])).logits
    assert_close(logits(config, params, tokens, positions)[0], expected.detach())

    torch.nn.functional.cross_entropy(expected.flatten(0, 1), torch.tensor(ids[:, 1:]).flatten()).backward()

    def loss(params):
        hidden, _ = model.forward(config, params, tokens, positions)
        weights = np.ones(targets.shape, np.float32)
        return chunked_cross_entropy(hidden, model.head(params), targets, weights) / targets.size

    got = jax.jit(jax.grad(loss))(params)
    want = tree_of(opened, {name: p.grad.numpy() for name, p in net.named_parameters()})
    jax.tree.map_with_path(lambda path, a, b: assert_close(a, b, jax.tree_util.keystr(path)), got, want)


def test_decoding_with_a_cache(mesh, published):
    folder, net = published
    opened = open_model(folder)
    config, params = opened.config, load_params(opened, dtype="float32", stacked=False)
    ids = tokens_of(config)
    with torch.no_grad():
        expected = net(torch.tensor(ids)).logits.numpy()
    cache, at = model.make_cache(config, 2, ids.shape[1]), 0
    for length in (9, 1, 1, 1, 1, 4):
        tokens = jnp.asarray(ids[:, at : at + length], jnp.int32)
        positions = jnp.broadcast_to(jnp.arange(at, at + length, dtype=jnp.int32), tokens.shape)
        got, cache = logits(config, params, tokens, positions, cache=cache)
        assert_close(got, expected[:, at : at + length], f"tokens from {at}")
        at += length


def test_export_opens_in_transformers_bit_for_bit(published, tmp_path):
    folder, net = published
    convert(open_model(folder), tmp_path / "native", to="native", dtype=None, say=str)
    convert(open_model(tmp_path / "native"), tmp_path / "back", to="hf", dtype=None, say=str)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager")
    named = dict(again.named_parameters())
    assert {name for name, _ in net.named_parameters()} == set(named)
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, named[name]), name
    ids = torch.tensor(tokens_of(open_model(folder).config))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, net(ids).logits)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_a_config_made_here_opens_in_transformers(kind, tmp_path):
    """Without a published config.json to go by: a model that was trained here."""
    from tests.conftest import tiny_config
    from tests.published import publish

    config = tiny_config(vocab_size=260, tie_embeddings=False, qk_norm=kind == "qwen3", qkv_bias=kind == "qwen2")
    tensors = publish(tmp_path / "published", config, hf.model_type_of(config))
    net = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "published")
    assert net.config.model_type == kind
    assert net.config.rope_parameters["rope_theta"] == config.rope.theta
    for name, parameter in net.named_parameters():
        np.testing.assert_array_equal(parameter.detach().float(), tensors[name])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "published")
    assert tokenizer.encode("the <|im_end|>") == tiny_tokenizer().encode_trusted("the <|im_end|>")


def test_the_command_compares_layer_by_layer(published, tmp_path, capsys):
    folder, net = published
    convert(open_model(folder), tmp_path / "native", to="native", dtype=None, say=str)
    assert verify([str(tmp_path / "native"), str(folder), "--forward"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("equal: ") and [line[:12].strip() for line in lines[1:]] == [
        "layer 0", "layer 1", "final norm", "logits",
    ]  # fmt: skip
    for line in lines[1:]:
        difference, largest = (float(line.split()[i]) for i in (-3, -1))
        assert 0 < difference <= RELATIVE * largest or difference == 0, line
