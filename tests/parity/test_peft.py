"""Adapters as PEFT computes them: its folders opened here, ours opened there."""

from __future__ import annotations

import numpy as np
import pytest

from qwen_jax.weights import peft as ours
from qwen_jax.weights.load import load_params
from qwen_jax.weights.source import open_model
from tests.published import assert_close, logits, tiny_tokenizer
from tests.weights.test_peft import make

torch = pytest.importorskip("torch", reason="the oracle: pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers", reason="the oracle: pip install -e '.[parity]'")
peft = pytest.importorskip("peft", reason="the oracle: pip install -e '.[parity]'")

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("mesh")]

COMMON = dict(
    vocab_size=288, hidden_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=44, rope_theta=12345.0, max_position_embeddings=64, initializer_range=0.2,
)  # fmt: skip
TABLES = ["embed_tokens", "lm_head"]


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def base(request, tmp_path):
    """A folder that transformers saved."""
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**COMMON, tie_word_embeddings=request.param))
    for name, tensor in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(tensor, std=0.2)
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_bytes(tiny_tokenizer().to_bytes())
    return tmp_path / "base"


def assert_same_logits(folder, theirs):
    ids = np.random.default_rng(1).integers(0, 260, (2, 12), dtype=np.int32)
    with torch.no_grad():
        want = theirs.eval()(torch.tensor(ids, dtype=torch.long)).logits.numpy()
        plain = theirs.get_base_model()
    assert plain is not None
    with open_model(folder) as opened:
        params = load_params(opened, dtype="float32", stacked=True)
        found = logits(opened.config, params, ids, np.broadcast_to(np.arange(12, dtype=np.int32), ids.shape))
        base = load_params(opened.base, dtype="float32", stacked=True)
        before = logits(opened.config, base, ids, np.broadcast_to(np.arange(12, dtype=np.int32), ids.shape))
    assert_close(found, want)
    assert np.abs(np.asarray(before) - want).max() > 0.1 * np.abs(want).max(), "the adapter does something"


def test_an_adapter_of_theirs(base, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    tied = model.config.tie_word_embeddings
    config = peft.LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False,
        modules_to_save=None if tied else TABLES, rank_pattern={"o_proj": 2}, alpha_pattern={"layers.1.mlp.up_proj": 3},
    )  # fmt: skip
    theirs = peft.get_peft_model(model, config)
    for name, tensor in theirs.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(tensor, std=0.2)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    assert_same_logits(tmp_path / "theirs", theirs)


def test_an_adapter_of_ours(base, tmp_path):
    (tmp_path / "ours").mkdir()
    ours.write(make(open_model(base), rank=3, tables=True, scale=0.05), tmp_path / "ours")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    assert_same_logits(tmp_path / "ours", peft.PeftModel.from_pretrained(model, tmp_path / "ours"))
