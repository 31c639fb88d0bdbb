"""Softmax attention with grouped heads, one signature over several implementations.

reference   the formula, with the whole [T, S] table in float32: the oracle of every other implementation
xla         blocks of queries in plain XLA
pallas      our kernel for TPU; on CPU it is interpreted, for tests
cudnn       cuDNN's kernel for NVIDIA GPUs, for masks without segments and windows
auto        the fastest that can honour the request where it runs
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from qwen_jax import sharding
from qwen_jax.errors import ConfigError
from qwen_jax.kernels.blocks import Generation
from qwen_jax.kernels.flash_attention import flash_attention
from qwen_jax.ops.blockwise import blockwise
from qwen_jax.ops.mask import HIDDEN, Mask

Implementation = Literal["auto", "pallas", "xla", "cudnn", "reference"]

_MIN_QUERIES = 128  # with fewer, a block of the kernel is mostly empty, and reading the keys is all the work there is


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Mask,
    *,
    implementation: Implementation,
) -> Float[Array, "B T N H"]:
    """`softmax(q k^T / sqrt(H) + mask) v` per head; query head n uses kv head n // (N / K).

    Scores, softmax and sums are float32; probabilities take q's dtype for the product with v. Queries may be split
    over `context`; keys and values are gathered along it. Raises ConfigError if the implementation cannot do this.
    """
    return on_each_device(body(implementation, q, mask), q, k, v, mask)


def body(
    implementation: Implementation, q: Float[Array, "B T N H"], mask: Mask
) -> Callable[..., Float[Array, "B T N H"]]:
    """What computes this on a device, of (q, k, v, mask). Raises ConfigError as `choose`."""
    bodies = {"reference": reference, "xla": _xla, "pallas": _pallas, "cudnn": _cudnn}
    return bodies[choose(implementation, q, mask)]


def on_each_device(
    body: Callable[..., Array],
    q: Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], ...],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Mask,
    *,
    rank: int = 4,
) -> Array:
    """`body(q, k, v, mask)` of what each device has, with all the keys that its queries may see.

    The result has the first `rank` dimensions of q.
    """
    k, v = one_kv_head_per_device(k), one_kv_head_per_device(v)
    queries = sharding.activation("btnh", jax.tree.leaves(q)[0].shape)
    keys = sharding.activation("bksh", k.shape)
    by_query, by_key = P(*queries[:2]), P(queries[0], None)
    specs = dataclasses.replace(
        mask,
        query_positions=by_query,
        key_positions=by_key,
        query_segments=None if mask.query_segments is None else by_query,
        key_segments=None if mask.key_segments is None else by_key,
        window=None if mask.window is None else P(),
        lengths=None if mask.lengths is None else P(queries[0]),
        dropout=mask.dropout and dataclasses.replace(mask.dropout, key=P()),
    )

    def own(q, k, v, mask):
        if mask.dropout:  # of other numbers where there are other queries or heads
            device = jax.lax.axis_index((*sharding.TOKENS, "tensor"))
            mask = dataclasses.replace(mask, dropout=mask.dropout.fold(device))
        return body(q, k, v, mask)

    # Each device then has all it needs: the body has no communication, and is the same on any mesh.
    arguments, in_specs = (q, k, v, mask), (jax.tree.map(lambda _: queries, q), keys, keys, specs)
    local = jax.shard_map(own, in_specs=in_specs, out_specs=P(*queries[:rank]), check_vma=False)
    return local(*jax.tree.map(jax.sharding.reshard, arguments, in_specs))


def few(q: Float[Array, "B T N H"]) -> bool:
    """Whether reading the keys is most of the work."""
    return q.shape[1] < _MIN_QUERIES * sharding.axis_size("context")


def choose(implementation: Implementation, q: Float[Array, "B T N H"], mask: Mask) -> Implementation:
    """What computes this. Raises ConfigError if the implementation that was asked for cannot."""
    platform = sharding.platform()
    # The kernel compares indices, which are positions of a cache, or of packed documents that are all there.
    by_index = mask.aligned or mask.query_segments is None
    if implementation == "auto":
        fast = sharding.tpu_generation() and by_index and not few(q) and not mask.dropout
        return "pallas" if fast else "xla"
    if mask.dropout and implementation in ("pallas", "cudnn"):
        raise ConfigError(f"attention={implementation!r} has no dropout of attention; choose 'auto' or 'xla'")
    if implementation == "pallas" and not sharding.tpu_generation() and platform != "cpu":
        raise ConfigError(f"attention='pallas' is a kernel for TPU v4 to v7x and this is {platform}; choose 'auto'")
    if implementation == "pallas" and not by_index:
        raise ConfigError("attention='pallas' cannot compare packed documents with others; choose 'auto'")
    if implementation == "cudnn":
        reasons = {
            f"this mesh is of {platform}": platform not in ("gpu", "cuda"),
            f"q is {q.dtype}": q.dtype not in (jnp.bfloat16, jnp.float16),
            "the rows are packed documents": mask.query_segments is not None,
            "a layer has a window": mask.window is not None,
            "queries and keys are not the same tokens": not mask.aligned or sharding.axis_size("context") > 1,
        }
        for reason in (reason for reason, holds in reasons.items() if holds):
            raise ConfigError(f"attention='cudnn' cannot be used, since {reason}; choose 'auto'")
    return implementation


def one_kv_head_per_device(x: Float[Array, "B K *s"]) -> Float[Array, "B R *s"]:
    """x itself, or, where K cannot be split over `tensor`, each head repeated for the devices that share it."""
    ways, (batch, heads, *rest) = sharding.axis_size("tensor"), x.shape
    if heads % ways == 0:
        return x
    wide = jnp.broadcast_to(x[:, :, None], (batch, heads, ways // heads, *rest))
    return wide.reshape(batch, ways, *rest)


def reference(
    q: Float[Array, "B T N H"], k: Float[Array, "B K S H"], v: Float[Array, "B K S H"], mask: Mask
) -> Float[Array, "B T N H"]:
    """The formula as it stands: every score in float32."""
    group = q.shape[2] // k.shape[1]
    k, v = jnp.repeat(k, group, axis=1), jnp.repeat(v, group, axis=1)
    scores = jnp.einsum("btnh,bnsh->bnts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    probs = jax.nn.softmax(jnp.where(mask.visible()[:, None], scores, HIDDEN), axis=-1)
    if mask.dropout:
        probs = mask.dropout.scaled(probs, mask.dropout.keep(probs.shape))
    return jnp.einsum("bnts,bnsh->btnh", probs.astype(q.dtype), v, preferred_element_type=jnp.float32).astype(q.dtype)


def _xla(
    q: Float[Array, "B T N H"], k: Float[Array, "B K S H"], v: Float[Array, "B K S H"], mask: Mask
) -> Float[Array, "B T N H"]:
    return partial_xla(q, k, v, mask)[0]


def partial_xla(
    q: Float[Array, "B T N H"], k: Float[Array, "B K S H"], v: Float[Array, "B K S H"], mask: Mask
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """A device's attention, and the log-sum-exp of its scores."""
    # A part of the queries is not aligned with all the keys, but may be hidden from any of them.
    return blockwise(q, k, v, dataclasses.replace(mask, aligned=mask.aligned and sharding.axis_size("context") == 1))


def _cudnn(
    q: Float[Array, "B T N H"], k: Float[Array, "B K S H"], v: Float[Array, "B K S H"], mask: Mask
) -> Float[Array, "B T N H"]:
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def _pallas(
    q: Float[Array, "B T N H"], k: Float[Array, "B K S H"], v: Float[Array, "B K S H"], mask: Mask
) -> Float[Array, "B T N H"]:
    return partial_pallas(q, k, v, mask)[0]


def partial_pallas(
    q: Float[Array, "B T N H"], k: Float[Array, "B K S H"], v: Float[Array, "B K S H"], mask: Mask
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Likewise, where indices stand for positions."""
    key_segments = mask.key_segments
    ways, length = sharding.axis_size("context"), q.shape[1]
    if mask.balanced and ways > 1:
        # Keys come in the order of the columns: in their own they need no positions to be compared.
        k, v = sharding.sequence_order(k, 2), sharding.sequence_order(v, 2)
        key_segments = None if key_segments is None else sharding.sequence_order(key_segments, 1)
    outs, lses = [], []
    for columns, offset in _runs(mask, length):
        out, lse = flash_attention(
            q[:, columns].swapaxes(1, 2),
            k,
            v,
            scale=q.shape[-1] ** -0.5,
            query_segments=None if mask.query_segments is None else mask.query_segments[:, columns],
            key_segments=key_segments,
            window=mask.window,
            query_offset=offset,
            generation=cast(Generation, sharding.tpu_generation() or "v5e"),  # blocks of any size can be interpreted
            interpret=sharding.platform() == "cpu",
        )
        outs.append(out.swapaxes(1, 2))
        lses.append(lse.swapaxes(1, 2))
    return jnp.concatenate(outs, axis=1), jnp.concatenate(lses, axis=1)


def _runs(mask: Mask, length: int) -> list[tuple[slice, Int[Array, ""] | Int[Array, " B"]]]:
    """The columns of this device that follow each other in the sequence, and where among the keys each run begins."""
    if not mask.aligned:
        return [(slice(0, length), mask.query_positions[:, 0])]  # slots of a cache
    device, ways = jax.lax.axis_index("context"), sharding.axis_size("context")
    if not mask.balanced or ways == 1:
        return [(slice(0, length), device * length)]
    half = length // 2
    return [(slice(0, half), device * half), (slice(half, length), (2 * ways - 1 - device) * half)]
