"""Dual chunk attention (An et al., 2024): where a query turns to depends on how many chunks before its own a key is.

A query comes turned in three ways: for keys of its own chunk, of the chunk before, and of all earlier ones. Scores of
all three are in one softmax. With few queries that is what is computed; with many, attention to the keys of each kind
is attention with another mask, and the results are merged by their log-sum-exp.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qwen_jax.errors import ConfigError
from qwen_jax.ops.attention import Implementation, attention, choose, few, on_each_device, partial_pallas, partial_xla
from qwen_jax.ops.mask import HIDDEN, Mask

Queries = tuple[Float[Array, "B T N H"], ...]


def dual_chunk_attention(
    queries: Queries,
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Mask,
    *,
    chunk: int,
    implementation: Implementation,
) -> Float[Array, "B T N H"]:
    """`ops.attention.attention`, where the query of a score is one of three.

    Args:
      queries: three, for keys of the query's own chunk, of the chunk before, and of earlier ones.
      k, v: keys and values.
      mask: what may be seen; its positions are below S.
      chunk: tokens of a chunk, of which each document begins a new one.
      implementation: as of `attention`; "reference" is one softmax over whole [T, S] tables.

    Raises ConfigError if the implementation cannot do this.
    """
    if k.shape[2] <= chunk:
        return attention(queries[0], k, v, mask, implementation=implementation)
    return on_each_device(body(implementation, queries, mask, chunk=chunk), queries, k, v, mask)


def body(
    implementation: Implementation, queries: Queries, mask: Mask, *, chunk: int
) -> Callable[..., Float[Array, "B T N H"]]:
    """What computes this on a device, of (queries, k, v, mask), where there are more keys than a chunk has."""
    if implementation == "cudnn":
        raise ConfigError(
            f"attention='cudnn' cannot be used, since dual chunk attention cuts rows of {mask.key_positions.shape[1]} "
            f"tokens into chunks of {chunk}; choose 'auto'"
        )
    name = choose(implementation, queries[0], mask)
    if name == "reference" or (name == "xla" and few(queries[0]) and not mask.aligned):
        return functools.partial(_in_one_softmax, chunk=chunk)
    compute = functools.partial(in_parts, chunk=chunk, by_index=name == "pallas")
    return lambda *arguments: compute(*arguments)[0]


def _in_one_softmax(
    queries: Queries, k: Float[Array, "B K S H"], v: Float[Array, "B K S H"], mask: Mask, *, chunk: int
) -> Float[Array, "B T N H"]:
    """The formula, with each key read once: the three queries of all heads that share it are rows of one matrix."""
    q = queries[0]
    batch, length, heads, dim = q.shape
    grouped = jnp.stack(queries, axis=1).reshape(batch, 3, length, k.shape[1], -1, dim)
    rows = jnp.moveaxis(grouped, 3, 1).reshape(batch, k.shape[1], -1, dim)
    scores = jnp.einsum("bkmh,bksh->bkms", rows, k, preferred_element_type=jnp.float32) * dim**-0.5
    own, before, earlier = jnp.moveaxis(scores.reshape(batch, k.shape[1], 3, length, -1, k.shape[2]), 2, 0)
    back = mask.query_positions[:, :, None] // chunk - mask.key_positions[:, None] // chunk
    back, visible = back[:, None, :, None], mask.visible()[:, None, :, None]
    scores = jnp.where(back == 0, own, jnp.where(back == 1, before, earlier))
    probs = jax.nn.softmax(jnp.where(visible, scores, HIDDEN), axis=-1).astype(q.dtype)
    out = jnp.einsum("bktgs,bksh->btkgh", probs, v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype).reshape(q.shape)


def in_parts(
    queries: Queries, k: Float[Array, "B K S H"], v: Float[Array, "B K S H"], mask: Mask, *, chunk: int, by_index: bool
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """A device's attention, and the log-sum-exp of its scores."""
    compute = partial_pallas if by_index else partial_xla
    parts = [compute(queries[kind], k, v, part) for kind, part in _parts(mask, chunk, by_index=by_index)]
    return merge(parts), jax.nn.logsumexp(jnp.stack([lse for _, lse in parts]), axis=0)


def merge(
    parts: Sequence[tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]],
) -> Float[Array, "B T N H"]:
    """The attention to all keys, from that to each part of them and the log-sum-exp of its scores."""
    outs, lses = zip(*parts, strict=True)
    weights = jax.nn.softmax(jnp.stack(lses), axis=0)[..., None]
    weighted = (weight * out.astype(jnp.float32) for weight, out in zip(weights, outs, strict=True))
    return functools.reduce(jnp.add, weighted).astype(outs[0].dtype)


def _parts(mask: Mask, chunk: int, *, by_index: bool) -> list[tuple[int, Mask]]:
    """Which of the queries each part takes, and what it sees: masks that do not overlap, and together are `mask`."""
    chunks = -(-mask.key_positions.shape[1] // chunk)
    at = mask.query_positions // chunk
    query_ids = _ids(at, mask.query_segments, chunks)
    key_ids = _ids(mask.key_positions // chunk, mask.key_segments, chunks)

    def back(count: int) -> Mask:
        """Keys so many chunks before the query's. Each chunk of a document becomes a segment."""
        segments = jnp.where(at >= count, query_ids - count, -1)
        band = max((count - 1) * chunk + 1, 0), (count + 1) * chunk - 1
        return dataclasses.replace(mask, query_segments=segments, key_segments=key_ids, band=band)

    parts = [(min(count, 2), back(count)) for count in range(chunks if by_index else min(chunks, 2))]
    if chunks > 2 and not by_index:
        # All earlier chunks at once: what the last token two chunks before sees.
        parts.append((2, dataclasses.replace(mask, query_positions=(at - 1) * chunk - 1, band=(chunk + 1, None))))
    return parts


def _ids(at: Int[Array, "B L"], segments: Int[Array, "B L"] | None, chunks: int) -> Int[Array, "B L"]:
    """A number for each chunk of each document, one more than that of the chunk before it; 0 in padding."""
    if segments is None:
        return at + 1
    return jnp.where(segments > 0, segments * chunks + at + 1, 0)
