"""Decoding: prompts to tokens, and tokens to text.

decode      prefill and step, compiled; token ids only
completion  text as it is made, up to a token or a string that ends it
stop        stop strings in text that arrives in pieces
checkpoint  an engine from a model on disk
"""

from qwen_jax.engine.checkpoint import load
from qwen_jax.engine.completion import Completion, generate
from qwen_jax.engine.decode import Engine
from qwen_jax.engine.stop import StopStrings
from qwen_jax.ops.sampling import Sampling
from qwen_jax.ops.vertical_slash import VerticalSlash

__all__ = [
    # The model, ready to decode
    "Engine",
    "load",
    "VerticalSlash",
    # How tokens are chosen, and what comes of them
    "Sampling",
    "Completion",
    "StopStrings",
    "generate",
]
