"""The whole model, in one forward pass for training, prefill and decoding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from qwen_jax import sharding
from qwen_jax.config import ModelConfig
from qwen_jax.model.block import Block
from qwen_jax.model.cache import Batch, Cache
from qwen_jax.model.heads import ScoreHead
from qwen_jax.model.layers import RMSNorm, Table
from qwen_jax.model.noise import Noise
from qwen_jax.ops import quantized
from qwen_jax.ops.attention import Implementation
from qwen_jax.ops.embedding import embed
from qwen_jax.ops.linear import product
from qwen_jax.ops.mask import Mask
from qwen_jax.ops.quantized import Quantized
from qwen_jax.ops.rope import rotation
from qwen_jax.ops.router import Load
from qwen_jax.ops.vertical_slash import VerticalSlash

Params = Mapping[str, Any]
Remat = Literal["none", "dots", "full"]

_POLICIES = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}


class Qwen(nn.Module):
    """Token ids to the hidden states under the output head, or under the score.

    Attributes:
      config: shape and constants.
      scan: layers are one scanned block over stacked [L, ...] parameters; otherwise one block each.
      remat: what the backward pass recomputes: nothing, all but matrix products, or whole layers.
      attention: which implementation.
      balanced: the columns are in the order of `sharding.balanced_columns`.
      sparse: how a group of more than one token per row is taken into a cache; None for full attention.
    """

    config: ModelConfig
    scan: bool
    remat: Remat = "none"
    attention: Implementation = "auto"
    balanced: bool = False
    sparse: VerticalSlash | None = None

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"] | None = None,
        batch: Batch | None = None,
        cache: Cache | None = None,
        noise: Noise | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None, Load | None]:
        c = self.config
        dtype, param_dtype = jnp.dtype(c.dtype), jnp.dtype(c.param_dtype)
        table = Table((c.vocab_size, c.width), param_dtype, name="embed")()
        x = embed(tokens, cast(Array | Quantized, table), dtype=dtype)  # adapters replace a table, and adapt none
        x = noise.on_embeddings(x, segments) if noise else x
        dropout = noise.of_attention(c.num_layers) if noise else None
        lengths = _lengths(positions, segments, batch) if c.rope.by_length else None
        search = self.sparse is not None
        turn = rotation(c.rope, positions, lengths, head_dim=c.head_dim, logn=c.logn, dtype=dtype, search=search)
        mask = batch or _mask(positions, segments, balanced=self.balanced)
        block = Block
        if self.remat != "none":
            # Under scan the loop itself keeps the recomputation from being merged with the forward pass.
            block = nn.remat(Block, prevent_cse=not self.scan, policy=_POLICIES[self.remat])
        if self.scan:
            layers = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                # One per argument, which flax accepts and its annotation does not say.
                in_axes=cast(
                    Any, (0 if c.windows else nn.broadcast, *[nn.broadcast] * 3, 0 if dropout else nn.broadcast)
                ),
                length=c.num_layers,
            )
            x, (_, load) = layers(c, self.attention, name="layers")(x, _windows(c), None, turn, mask, dropout)
        else:
            filled, loads = [], []
            for i in range(c.num_layers):
                window = jnp.int32(c.windows[i]) if c.windows and c.windows[i] else None
                layer = None if cache is None else cache.layers[i]
                x, (layer, load) = block(c, self.attention, self.sparse, name=f"layers_{i}")(
                    x, window, layer, turn, mask, jax.tree.map(lambda keys, i=i: keys[i], dropout)
                )
                filled.append(layer)
                loads.append(load)
            cache = None if cache is None else Cache(tuple(filled))
            load = jax.tree.map(lambda *each: jnp.stack(each), *loads)
        x = RMSNorm(c.norm_eps, param_dtype, name="final_norm")(x)
        if c.score:
            # Only makes the parameters: the compiler leaves out a result that nothing reads.
            ScoreHead(c.score, param_dtype, name="score")(x)
        elif not c.tie_embeddings:
            Table((c.vocab_size, c.width), param_dtype, name="head")()
        return x, cache, load


def _split(*arrays: Array | None) -> list[Array | None]:
    """[B, T] arrays split over the current mesh."""
    return [x if x is None else jax.sharding.reshard(x, sharding.activation("bt", x.shape)) for x in arrays]


def _lengths(positions: Array, segments: Array | None, batch: Batch | None) -> Array:
    """Tokens of each row [B]: of its prompt where there is a cache, else of its longest document."""
    if batch is not None:
        if batch.prompts is None:
            raise ValueError("rotations go by the lengths of the prompts: give the batch `prompts`")
        return batch.prompts
    real = positions if segments is None else jnp.where(segments > 0, positions, -1)
    return real.max(axis=1) + 1


def _mask(positions: Array, segments: Array | None, *, balanced: bool) -> Mask:
    return Mask(
        query_positions=positions,
        key_positions=positions,
        query_segments=segments,
        key_segments=segments,
        aligned=True,
        balanced=balanced,
    )


def _windows(config: ModelConfig) -> Int[Array, " L"] | None:
    """Window of each layer, with "all" as a number no distance reaches; None where every layer sees all."""
    if not config.windows:
        return None
    return jnp.array([window or jnp.iinfo(jnp.int32).max for window in config.windows], jnp.int32)


def init(config: ModelConfig, key: Array) -> Params:
    """Fresh parameters, layers stacked, split over the current mesh; the same numbers on any mesh."""
    tokens = jnp.zeros((sharding.axis_size(sharding.BATCH), sharding.axis_size("context")), jnp.int32)
    tokens = jax.sharding.reshard(tokens, sharding.activation("bt", tokens.shape))
    return Qwen(config, scan=True).init(key, tokens, tokens)["params"]


def abstract(config: ModelConfig) -> Params:
    """Shapes, dtypes and shardings of the parameters on the current mesh, layers stacked."""
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))


def forward(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    *,
    segments: Int[Array, "B T"] | None = None,
    remat: Remat = "none",
    attention: Implementation = "auto",
    balanced: bool = False,
    noise: Noise | None = None,
) -> Float[Array, "B T D"]:
    """The hidden states of `tokens`.

    Args:
      config: shape and constants.
      params: stacked, or one entry per layer.
      tokens: ids in [0, vocab_size).
      positions: of each token within its document.
      segments: number of the document of each token; None where a row is one document.
      remat: what the backward pass recomputes.
      attention: which implementation.
      balanced: columns are in the order of `sharding.balanced_columns`, which on a mesh with a `context` axis gives
        each device the same work.
      noise: for training; None for none.
    """
    module = Qwen(config, "layers" in params, remat, attention, balanced)
    return _apply(module, params, *_split(tokens, positions, segments), noise=noise)[0]


def forward_cached(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, " T"],
    batch: Batch,
    cache: Cache,
    *,
    attention: Implementation = "auto",
    sparse: VerticalSlash | None = None,
) -> tuple[Float[Array, "T D"], Cache]:
    """The hidden states of the new tokens of rows whose earlier ones are in a cache; and the cache with these too.

    Args:
      config: shape and constants.
      params: one entry per layer.
      tokens: ids in [0, vocab_size), T of them, a multiple of the ways that the mesh splits a batch.
      batch: whose they are.
      cache: what came before; donate it, or it is copied.
      attention: which implementation.
      sparse: groups of more than one token per row are attended to so, whatever their length; None for full attention.
    """
    if "layers" in params:
        raise ValueError("decoding takes parameters of one entry per layer: call unstack_layers(params) once before")
    columns = _split(tokens[:, None], batch.positions[:, None])
    module = Qwen(config, False, attention=attention, sparse=sparse)
    hidden, cache, _ = cast(tuple[Array, Cache, Any], _apply(module, params, *columns, batch=batch, cache=cache))
    return hidden[:, 0], cache


def forward_with_load(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    *,
    segments: Int[Array, "B T"] | None = None,
    remat: Remat = "none",
    attention: Implementation = "auto",
    balanced: bool = False,
    noise: Noise | None = None,
) -> tuple[Float[Array, "B T D"], Load]:
    """`forward` of a mixture of experts, without a cache, and the load of its routers, layers first."""
    module = Qwen(config, "layers" in params, remat, attention, balanced)
    hidden, _, load = _apply(module, params, *_split(tokens, positions, segments), noise=noise)
    if load is None:
        raise ValueError("forward_with_load() takes a mixture of experts, and this config has moe=None")
    return hidden, load


def _apply(module: Qwen, params: Params, *arguments: Any, **more: Any) -> tuple[Array, Cache | None, Load | None]:
    return cast(Any, module.apply({"params": params}, *arguments, **more))


def hidden_states(
    config: ModelConfig, params: Params, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]
) -> list[Float[Array, "B T D"]]:
    """What each layer adds up to, and last what the final norm makes of it: for comparing one model with another.

    Args:
      config, tokens, positions: as for `forward`.
      params: one entry per layer.
    """
    of_blocks = lambda module, method: isinstance(module, Block)
    (last, *_), state = Qwen(config, scan=False).apply(
        {"params": params}, *_split(tokens, positions), capture_intermediates=of_blocks, mutable=["intermediates"]
    )
    layers = cast(Any, state)["intermediates"]
    return [*(layers[f"layers_{i}"]["__call__"][0][0] for i in range(config.num_layers)), last]


def head(params: Params) -> Float[Array, "V D"] | Quantized:
    """The output head: its own table, or the embedding where they are tied. A model with a score has none."""
    if "score" in params:
        raise ValueError("a model with a score has no output head: take model.scores(config, params, hidden)")
    return params["head" if "head" in params else "embed"]["w"]


def logits(params: Params, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """The float32 logits of hidden states. For a few positions: a loss takes `ops.loss` instead."""
    table = head(params)
    if isinstance(table, Quantized):
        return quantized.contract("btd", "v", "d", hidden, table, dtype=jnp.dtype("float32"))
    return product("btd,vd->btv", hidden, sharding.gather(table.astype(hidden.dtype), "vd"))
