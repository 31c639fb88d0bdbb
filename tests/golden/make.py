"""Makes the golden folders anew: random models as transformers saves them, and what it computes with them.

    pip install -e '.[parity]'
    python tests/golden/make.py

The committed ones are of torch 2.13.0 (CPU) and transformers 5.23.0; with these, on one kind of CPU, the bytes are the
same each time. Every field of a config has a value that no default would give. A folder has the files of
`save_pretrained`, and beside them `expected.safetensors`:

    input_ids      [B, T]
    labels         [B, T], the input again, or [B], the class of each row
    logits         [B, T, V], or [B, C], the scores at the last token of each row
    loss           the mean cross-entropy, as the model returns it for these labels
    gradient.NAME  of the loss, by the tensor that is published as NAME
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

COMMON = dict(
    vocab_size=60, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=14, rms_norm_eps=3e-5, rope_theta=12345.0, max_position_embeddings=64, initializer_range=0.2,
    attn_implementation="eager",
)  # fmt: skip
WINDOWS = dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)
MODELS = {
    "qwen2-tied": ("Qwen2ForCausalLM", dict(tie_word_embeddings=True)),
    "qwen2-untied": ("Qwen2ForCausalLM", dict(tie_word_embeddings=False, num_key_value_heads=1)),
    "qwen2-windows": ("Qwen2ForCausalLM", dict(tie_word_embeddings=True, **WINDOWS)),
    "qwen3": ("Qwen3ForCausalLM", dict(tie_word_embeddings=False, head_dim=6)),
    # transformers takes several rows only with a token for padding; the ids below leave it out.
    "qwen2-classifier": (
        "Qwen2ForSequenceClassification",
        dict(tie_word_embeddings=True, num_labels=5, pad_token_id=0),
    ),
}


def make(folder: Path, name: str, changes: dict[str, Any]) -> None:
    """Writes the folder of a model of the class `name`."""
    torch.manual_seed(0)
    architecture = getattr(transformers, name)
    net = architecture(architecture.config_class(**(COMMON | changes)))
    with torch.no_grad():
        for parameter in net.parameters():  # biases and norms too
            parameter.add_(0.1 * torch.randn_like(parameter))
    net.save_pretrained(folder)
    ids = torch.randint(1, net.config.vocab_size, (2, 12))
    labels = ids.clone() if name.endswith("ForCausalLM") else torch.tensor([3, 1])
    computed = net(ids, labels=labels)
    computed.loss.backward()
    gradients = {f"gradient.{name}": parameter.grad for name, parameter in net.named_parameters()}
    results = {"logits": computed.logits.detach(), "loss": computed.loss.detach()}
    save_file({"input_ids": ids, "labels": labels, **results, **gradients}, folder / "expected.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)  # sums are then taken in one order
    for folder, (name, changes) in MODELS.items():
        make(Path(__file__).parent / folder, name, changes)
