"""Layer by layer, how far this library's forward pass is from that of the `transformers` library.

The one place outside of tests that imports torch and transformers, when a user asks for this comparison and has them.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np

from qwen_jax.errors import ModelError
from qwen_jax.model import hidden_states, logits
from qwen_jax.sharding import make_mesh
from qwen_jax.weights.load import load_params
from qwen_jax.weights.source import Model

LENGTH = 32  # tokens that are compared


def compare(ours: Model, published: Path) -> list[tuple[str, float, float]]:
    """For each layer and the logits: its name, the largest difference, and the largest value of theirs; in float32.

    Args:
      ours: computed here.
      published: a folder that transformers opens; nothing in it is executed.

    Raises ModelError where transformers is not installed or does not know the model.
    """
    config = dataclasses.replace(ours.config, dtype="float32", param_dtype="float32")
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, min(LENGTH, config.max_position)))
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        params = load_params(ours, dtype="float32", stacked=False)

        @jax.jit
        def run(params, tokens):
            positions = jax.numpy.arange(tokens.shape[1])[None]
            states = hidden_states(config, params, tokens, positions)
            return [*states, logits(params, states[-1])]

        found = jax.device_get(run(params, tokens.astype(np.int32)))
    wanted = _transformers(published, tokens)
    names = [f"layer {i}" for i in range(config.num_layers)] + ["final norm", "logits"]
    # What the last layer gives is not among the states that transformers returns: only what the norm makes of it.
    del names[config.num_layers - 1], found[config.num_layers - 1]
    return [
        (name, float(np.abs(a - b).max()), float(np.abs(b).max()))
        for name, a, b in zip(names, found, wanted, strict=True)
    ]


def _transformers(folder: Path, tokens: np.ndarray) -> list[np.ndarray]:
    try:
        import torch  # pyright: ignore[reportMissingImports]
        import transformers  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ModelError(
            f"{error.name} is not installed, and --forward compares with it: pip install '.[parity]'"
        ) from error
    transformers.logging.set_verbosity_error()
    try:
        net = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True, trust_remote_code=False
        )
    except (ValueError, OSError) as error:
        raise ModelError(f"transformers cannot open {folder}: {str(error).splitlines()[0]}") from error
    with torch.no_grad():
        out = net(torch.tensor(tokens), output_hidden_states=True, use_cache=False)
    return [state.numpy() for state in (*out.hidden_states[1:], out.logits)]
