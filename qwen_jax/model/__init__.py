"""The model: the only folder that imports flax.

B batch, T query, S key, D width, N heads, K kv heads, G = N / K, H head dim, F mlp, E experts, V vocabulary, L layers,
C labels of a score or of a router.
"""

from qwen_jax.model.adapter import attach, init_adapter, merge
from qwen_jax.model.cache import Batch, Cache, LayerCache, make_cache
from qwen_jax.model.heads import scores
from qwen_jax.model.layout import repeat_kv_heads, stack_layers, unstack_layers
from qwen_jax.model.noise import Noise
from qwen_jax.model.transformer import (
    Params,
    Qwen,
    Remat,
    abstract,
    forward,
    forward_cached,
    forward_with_load,
    head,
    hidden_states,
    init,
    logits,
)

__all__ = [
    # Parameters
    "Params",
    "init",
    "abstract",
    "stack_layers",
    "unstack_layers",
    "repeat_kv_heads",
    # Adapters
    "init_adapter",
    "attach",
    "merge",
    # The forward pass
    "Qwen",
    "Noise",
    "Remat",
    "forward",
    "forward_cached",
    "forward_with_load",
    "hidden_states",
    "head",
    "logits",
    "scores",
    # What decoding remembers
    "Batch",
    "Cache",
    "LayerCache",
    "make_cache",
]
