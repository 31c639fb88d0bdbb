"""Decoding: prompts to tokens, and tokens to text.

engine      requests in, tokens out, many rows at a time
replicas    several engines, asked as one
request     what is asked for, and what comes of it
scheduler   which rows a step computes
pages       which pages of the cache are whose
packing     rows as arrays of few shapes
steps       what is compiled
speculative guesses at tokens, which a step of the model checks
completion  text as it is made, up to a token or a string that ends it
chat_completion  the thought, the words and the calls of such a text
structured  what an answer may be: JSON, calls of tools, patterns
stop        stop strings in text that arrives in pieces
checkpoint  an engine from a model on disk
scoring     what a reward model thinks of texts
"""

from qwen_jax.engine.chat_completion import ChatCompletion
from qwen_jax.engine.checkpoint import load, load_draft
from qwen_jax.engine.completion import Completion, generate
from qwen_jax.engine.engine import Engine, Stats
from qwen_jax.engine.packing import Capacity
from qwen_jax.engine.replicas import Replicas
from qwen_jax.engine.request import Constraint, FinishReason, Request, Token
from qwen_jax.engine.speculative import DraftModel, PromptLookup
from qwen_jax.engine.stop import StopStrings
from qwen_jax.ops.sampling import Sampling
from qwen_jax.ops.vertical_slash import VerticalSlash

__all__ = [
    # The model, ready to decode
    "Engine",
    "Replicas",
    "Capacity",
    "Stats",
    "load",
    "load_draft",
    "VerticalSlash",
    "PromptLookup",
    "DraftModel",
    # What is asked of it, and what comes of that
    "Request",
    "Sampling",
    "Constraint",
    "Token",
    "FinishReason",
    # Text
    "Completion",
    "ChatCompletion",
    "StopStrings",
    "generate",
]
