"""Rotary position embedding in the half-split layout (Su et al., 2021; NeoX layout), and its scalings by length."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qwen_jax.config import DualChunk, DynamicNTK, Linear, QwenNTK, Rope, Yarn


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotation:
    """What turns the pairs (x[i], x[i + H/2]) of every head at each position.

    Attributes:
      cos, sin: [B, T, 1, H/2], in the dtype the heads are turned in.
      logn: [B, T, 1, 1], what queries are multiplied with once turned; None for one.
      afar: of dual chunk attention, how queries turn for keys of the chunk before theirs, and for those of all earlier
        chunks; empty for others.
      search: likewise where their true distance to keys shows, by which sparse attention looks for its pattern; empty
        unless asked for.
    """

    cos: Array
    sin: Array
    logn: Array | None = None
    afar: tuple[Rotation, ...] = ()
    search: tuple[Rotation, ...] = ()


def rotation(
    rope: Rope,
    positions: Int[Array, "B T"],
    lengths: Int[Array, " B"] | None,
    *,
    head_dim: int,
    logn: int,
    dtype: jnp.dtype,
    search: bool = False,
) -> Rotation:
    """The rotation of pair i by `positions[b, t] * frequencies[i]`.

    Args:
      rope: the embedding.
      positions: of the tokens.
      lengths: tokens that each row's prompt has, from which scalings by length follow; None for others.
      head_dim: H.
      logn: the training length of log-n attention; 0 for none.
      dtype: of the heads.
      search: whether `Rotation.search` is wanted.
    """
    turns = frequencies(rope, positions, lengths, head_dim=head_dim)
    match rope.scaling:
        case DualChunk() as chunks:
            factor = _length_factor(chunks, positions, lengths) if rope.by_length else None
            turned = lambda places: tuple(_turned(at, turns, factor, dtype) for at in places)
            own, *afar = turned(_within_chunks(chunks, positions))
            true = turned(_past_chunks(chunks, positions)) if search else ()
            return dataclasses.replace(own, afar=tuple(afar), search=true)
        case Yarn(attention_factor=factor):
            turned = _turned(positions, turns, factor, dtype)
        case _:
            turned = _turned(positions, turns, None, dtype)
    return dataclasses.replace(turned, logn=_logn(positions, logn).astype(dtype) if logn else None)


def _turned(
    positions: Int[Array, "B T"],
    turns: Float[Array, "..."],
    factor: Float[Array, "B T 1 1"] | float | None,
    dtype: jnp.dtype,
) -> Rotation:
    """The rotation by `positions * turns`, which multiplies by `factor` too."""
    # float32: bfloat16 cannot tell position 257 from 256.
    angles = positions[:, :, None, None].astype(jnp.float32) * turns
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if factor is not None:
        cos, sin = cos * factor, sin * factor
    return Rotation(cos.astype(dtype), sin.astype(dtype))


def _within_chunks(chunks: DualChunk, positions: Int[Array, "B T"]) -> list[Int[Array, "B T"]]:
    """Where keys stand, and queries for keys of their own chunk; queries for the chunk before; and for earlier ones."""
    within, size = positions % chunks.chunk, chunks.chunk_size
    return [
        within,
        jnp.minimum(within + chunks.chunk, size),
        jnp.full_like(positions, min(2 * chunks.chunk - 1, size)),
    ]


def _past_chunks(chunks: DualChunk, positions: Int[Array, "B T"]) -> list[Int[Array, "B T"]]:
    """Where queries for keys of the chunk before, and of earlier ones, stand without the limit of the chunk size.

    As published: of all earlier chunks too, a key further on in its chunk seems nearer.
    """
    within = positions % chunks.chunk
    return [within + chunks.chunk, within + chunks.chunk_size]


def _length_factor(
    chunks: DualChunk, positions: Int[Array, "B T"], lengths: Int[Array, " B"] | None
) -> Float[Array, "B T 1 1"]:
    """`0.1 ln(length / original_positions) + 1`, at least 1; a token that is decoded has the length that it makes."""
    length = jnp.maximum(positions + 1, _given(lengths)).astype(jnp.float32)[:, :, None, None]
    return jnp.maximum(0.1 * jnp.log(length / chunks.original_positions) + 1, 1)


def frequencies(
    rope: Rope, positions: Int[Array, "B T"], lengths: Int[Array, " B"] | None, *, head_dim: int
) -> Float[Array, "..."]:
    """How far each pair turns per position: float32, [H/2], or by length [B, 1 or T, 1, H/2].

    Plain, it is `theta^(-2i / H)` for pair i. By length, the base is `theta * stretch^(H / (H - 2))`, with which the
    fastest pair stays and the slowest becomes `stretch` times slower; 1 within the original positions.
    """
    plain = rope.theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    match rope.scaling:
        case None | DualChunk():
            return plain
        case Linear(factor=factor):
            return plain / factor
        case Yarn() as yarn:
            slow = jnp.asarray(_ramp(yarn, rope.theta, head_dim))
            return plain / yarn.factor * slow + plain * (1 - slow)
        case QwenNTK(original_positions=original):
            stretch = _alpha(_given(lengths), original)
        case DynamicNTK(factor=factor, original_positions=original):
            # A token that is decoded finds the keys before it turned as they were when they were made.
            beyond = jnp.maximum(jnp.maximum(positions + 1, _given(lengths)) - original, 0)
            stretch = 1 + factor * beyond.astype(jnp.float32) / original
    # A base times its stretch, raised to a power, is this product: at a stretch of one, the plain bits.
    power = -jnp.arange(0, head_dim, 2, dtype=jnp.float32) / (head_dim - 2)
    return plain * stretch[..., None, None] ** power


def _given(lengths: Int[Array, " B"] | None) -> Int[Array, "B 1"]:
    if lengths is None:
        raise ValueError("this rope scaling looks at the length of each row: give lengths")
    return lengths[:, None]


def _alpha(lengths: Int[Array, "B 1"], original: int) -> Float[Array, "B 1"]:
    """`2^ceil(log2(length / original) + 1) - 1`, at least 1, in whole numbers: a logarithm may miss a power of two."""
    bounds = [original << n for n in range(31) if original << n < 2**31]
    doublings = (lengths > jnp.array(bounds, jnp.int32)).sum(axis=1, keepdims=True)
    return (jnp.left_shift(2, doublings) - 1).astype(jnp.float32)


def kind(rope: Rope, length: int) -> int:
    """A number that rows share if, for prompts of their lengths, equal tokens at equal positions turn alike."""
    match rope.scaling:
        case QwenNTK(original_positions=original):
            return (-(-length // original) - 1).bit_length()
        case DynamicNTK(original_positions=original) | DualChunk(original_positions=original) if rope.by_length:
            return length if length > original else 0
    return 0


def _ramp(yarn: Yarn, theta: float, head_dim: int) -> np.ndarray:
    """[H/2] from 0, for pairs that stay, to 1, for those that become slower."""

    def pair(turns: float) -> float:
        """The pair, as a fraction, that turns so many times in the original positions."""
        return head_dim * math.log(yarn.original_positions / (2 * math.pi * turns)) / (2 * math.log(theta))

    low, high = max(math.floor(pair(yarn.beta_fast)), 0), min(math.ceil(pair(yarn.beta_slow)), head_dim - 1)
    # As in transformers, down to the width of a ramp that has none.
    width = high - low if high != low else 0.001
    return np.clip((np.arange(head_dim // 2) - low) / width, 0, 1).astype(np.float32)


def _logn(positions: Int[Array, "B T"], trained: int) -> Float[Array, "B T 1 1"]:
    """`log(p + 1) / log(trained)` at positions p from `trained` on, 1 before."""
    count = positions[:, :, None, None] + 1
    return jnp.where(count > trained, jnp.log(count.astype(jnp.float32)) / math.log(trained), 1)


def rotate(x: Float[Array, "B T N H"], by: Rotation) -> Float[Array, "B T N H"]:
    """`x` with each head turned."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * by.cos - second * by.sin, second * by.cos + first * by.sin], axis=-1)
