"""The model against the implementation of the `transformers` library, on random weights at unusual settings."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import model
from qwen_jax.ops.loss import chunked_cross_entropy
from tests.conftest import tiny_config

torch = pytest.importorskip("torch", reason="the oracle: pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers", reason="the oracle: pip install -e '.[parity]'")

pytestmark = pytest.mark.filterwarnings("default")

# float32 on both sides, sums in another order, some layers deep.
PARITY = dict(rtol=1e-4, atol=2e-5)


def oracle(config):
    """A random Hugging Face model of this config, biases and scales included."""
    common = dict(
        vocab_size=config.vocab_size, hidden_size=config.width, num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads, head_dim=config.head_dim,
        intermediate_size=config.mlp_width, rms_norm_eps=config.norm_eps, tie_word_embeddings=config.tie_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta}, attn_implementation="eager",
        max_position_embeddings=config.max_position,
    )  # fmt: skip
    torch.manual_seed(0)
    if config.qk_norm:
        net = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**common, attention_bias=False))
    else:
        net = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**common))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net.eval()


def translate(config, named):
    """Hugging Face names to this library's stacked tree."""
    get = lambda name: named[name].detach().numpy()

    def layer(i):
        at = f"model.layers.{i}."
        heads = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}
        attention = {}
        for name, n in heads.items():
            w = get(f"{at}self_attn.{name}_proj.weight")
            attention[name] = {"w": w.reshape(n, config.head_dim, config.width)}
            if config.qkv_bias:
                attention[name]["b"] = get(f"{at}self_attn.{name}_proj.bias").reshape(n, config.head_dim)
            if config.qk_norm and name in "qk":
                attention[f"{name}_norm"] = {"scale": get(f"{at}self_attn.{name}_norm.weight")}
        o = get(f"{at}self_attn.o_proj.weight")
        attention["o"] = {"w": o.reshape(config.width, config.num_heads, config.head_dim)}
        return {
            "attention": attention,
            "attention_norm": {"scale": get(f"{at}input_layernorm.weight")},
            "mlp": {name: {"w": get(f"{at}mlp.{name}_proj.weight")} for name in ("gate", "up", "down")},
            "mlp_norm": {"scale": get(f"{at}post_attention_layernorm.weight")},
        }

    layers = [layer(i) for i in range(config.num_layers)]
    params = {
        "embed": {"w": get("model.embed_tokens.weight")},
        "layers": jax.tree.map(lambda *xs: np.stack(xs), *layers),
        "final_norm": {"scale": get("model.norm.weight")},
    }
    if not config.tie_embeddings:
        params["head"] = {"w": get("lm_head.weight")}
    return params


@pytest.mark.parametrize(
    "changes",
    [
        dict(head_dim=8),
        dict(head_dim=8, tie_embeddings=False, num_kv_heads=1),
        dict(head_dim=12, qk_norm=True, qkv_bias=False),
    ],
    ids=["qwen2 tied", "qwen2 untied", "qwen3"],
)
def test_logits_and_gradients(mesh, changes):
    config = tiny_config(**changes)
    net = oracle(config)
    params = jax.tree.map(jnp.asarray, translate(config, dict(net.named_parameters())))
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 17))
    tokens, targets = ids[:, :-1].astype(np.int32), ids[:, 1:].astype(np.int32)
    positions = np.tile(np.arange(16, dtype=np.int32), (2, 1))

    expected = net(torch.tensor(tokens.astype(np.int64))).logits
    hidden, _ = model.forward(config, params, tokens, positions)
    np.testing.assert_allclose(model.logits(params, hidden), expected.detach().numpy(), **PARITY)

    torch.nn.functional.cross_entropy(
        expected.flatten(0, 1), torch.tensor(targets.astype(np.int64)).flatten()
    ).backward()

    def loss(params):
        hidden, _ = model.forward(config, params, tokens, positions)
        return (
            chunked_cross_entropy(hidden, model.head(params), targets, np.ones(targets.shape, np.float32))
            / targets.size
        )

    got = jax.jit(jax.grad(loss))(params)
    want = translate(config, {name: p.grad for name, p in net.named_parameters()})
    jax.tree.map_with_path(
        lambda path, a, b: np.testing.assert_allclose(a, b, **PARITY, err_msg=jax.tree_util.keystr(path)), got, want
    )
