"""Published models as the `transformers` library computes them, opened here and opened there again after export.

Tiny random models with every field at an unusual value; weights go through files both ways.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

from qwen_jax import model
from qwen_jax.config import Moe
from qwen_jax.ops.router import balance_loss, z_loss
from qwen_jax.weights import hf
from qwen_jax.weights.convert import convert
from qwen_jax.weights.load import load_params
from qwen_jax.weights.source import open_model
from qwen_jax.weights.verify import main as verify
from tests.conftest import tiny_config
from tests.published import (
    RELATIVE,
    assert_close,
    assert_decodes,
    loss_and_gradients,
    publish,
    tiny_tokenizer,
    tree_of,
)

torch = pytest.importorskip("torch", reason="the oracle: pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers", reason="the oracle: pip install -e '.[parity]'")

pytestmark = pytest.mark.filterwarnings("default")

COMMON = dict(
    vocab_size=288, hidden_size=40, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=14,
    intermediate_size=44, rms_norm_eps=3e-5, rope_theta=12345.0, max_position_embeddings=64, initializer_range=0.2,
    attn_implementation="eager",
)  # fmt: skip
EXPERTS = dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=20, num_hidden_layers=2)
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
    "qwen2 experts": ("Qwen2Moe", EXPERTS | dict(norm_topk_prob=False, shared_expert_intermediate_size=36)),
    "qwen3 experts": ("Qwen3Moe", EXPERTS | dict(norm_topk_prob=True)),
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


def separate(tensors):
    """Tensors of a model in memory under the names they have in files: experts one by one."""
    named = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.partition(".experts.")
        if not kind:
            named[name] = tensor.numpy()
        for i, matrix in enumerate(tensor if kind else []):
            parts = (
                zip(["gate_proj", "up_proj"], matrix.chunk(2), strict=True)
                if kind == "gate_up_proj"
                else [(kind, matrix)]
            )
            named |= {f"{stem}.experts.{i}.{part}.weight": rows.numpy() for part, rows in parts}
    return named


def tokens_of(config, length=17):
    return np.random.default_rng(0).integers(0, config.vocab_size, (2, length))


def test_logits_loss_and_gradients(mesh, published):
    folder, net = published
    opened = open_model(folder)
    params = load_params(opened, dtype="float32", stacked=True)
    ids = tokens_of(opened.config)
    expected = net(torch.tensor(ids), labels=torch.tensor(ids))
    expected.loss.backward()
    outputs = (expected.loss.detach(), expected.logits.detach())
    gradients = tree_of(opened.config, opened.table, separate({name: p.grad for name, p in net.named_parameters()}))
    assert_close(loss_and_gradients(opened.config, params, ids.astype(np.int32)), (outputs, gradients))


@pytest.mark.parametrize("published", ["qwen2 experts", "qwen3 experts"], indirect=True)
def test_the_loss_of_the_router(mesh, published):
    folder, net = published
    opened = open_model(folder)
    ids, real = tokens_of(opened.config), np.ones((2, 17), np.int64)
    real[1, 11:] = 0  # on the right, where nothing that is not padding sees it
    net.set_attn_implementation("eager")
    with torch.no_grad():
        out = net(torch.tensor(ids), attention_mask=torch.tensor(real), output_router_logits=True)
    positions = np.broadcast_to(np.arange(17, dtype=np.int32), ids.shape)
    params = load_params(opened, dtype="float32", stacked=True)
    run = jax.jit(model.forward_with_load, static_argnums=0)
    _, load = run(opened.config, params, ids.astype(np.int32), positions, segments=real.astype(np.int32))
    assert float(balance_loss(load, 3, by_row=False)) == pytest.approx(out.aux_loss.item(), rel=RELATIVE)
    logits = torch.cat(out.router_logits)[torch.tensor(real).ravel().bool().repeat(opened.config.num_layers)]
    assert float(z_loss(load, 3)) == pytest.approx((torch.logsumexp(logits, -1) ** 2).mean().item(), rel=RELATIVE)


def test_decoding_with_a_cache(mesh, published):
    folder, net = published
    opened = open_model(folder)
    ids = tokens_of(opened.config)
    with torch.no_grad():
        expected = net(torch.tensor(ids)).logits.numpy()
    assert_decodes(opened.config, load_params(opened, dtype="float32", stacked=False), ids, expected)


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


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "qwen2_moe", "qwen3_moe"])
def test_a_config_made_here_opens_in_transformers(kind, tmp_path):
    """Without a published config.json to go by: a model that was trained here."""
    qwen3, experts = kind.startswith("qwen3"), {}
    if kind.endswith("_moe"):
        moe = Moe(num_experts=3, top_k=2, expert_width=12, shared_width=0 if qwen3 else 20, normalize_top_k=qwen3)
        experts = dict(mlp_width=0, moe=moe)
    config = tiny_config(vocab_size=260, tie_embeddings=False, qk_norm=qwen3, qkv_bias=not qwen3, **experts)
    tensors = publish(tmp_path / "published", config, hf.model_type_of(config))
    net = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "published")
    assert net.config.model_type == kind
    assert net.config.rope_parameters["rope_theta"] == config.rope.theta
    for name, parameter in separate({name: p.detach().float() for name, p in net.named_parameters()}).items():
        np.testing.assert_array_equal(parameter, tensors[name])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "published")
    assert tokenizer.encode("the <|im_end|>") == tiny_tokenizer().encode_trusted("the <|im_end|>")


def test_the_command_compares_layer_by_layer(published, tmp_path, capsys):
    folder, net = published
    convert(open_model(folder), tmp_path / "native", to="native", dtype=None, say=str)
    assert verify([str(tmp_path / "native"), str(folder), "--forward"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("equal: ") and [line[:12].strip() for line in lines[1:]] == [
        *(f"layer {i}" for i in range(net.config.num_hidden_layers - 1)), "final norm", "logits",
    ]  # fmt: skip
    for line in lines[1:]:
        difference, largest = (float(line.split()[i]) for i in (-3, -1))
        assert 0 < difference <= RELATIVE * largest or difference == 0, line
