"""Rotary position embedding in the half-split layout (Su et al., 2021; NeoX layout)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qwen_jax.config import Rope


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotation:
    """What turns the pairs (x[i], x[i + H/2]) of every head at each position.

    Attributes:
      cos, sin: [B, T, 1, H/2], in the dtype the heads are turned in.
    """

    cos: Array
    sin: Array


def rotation(rope: Rope, positions: Int[Array, "B T"], *, head_dim: int, dtype: jnp.dtype) -> Rotation:
    """The rotation by `positions[b, t] * theta^(-2i / head_dim)` for pair i."""
    inv_freq = rope.theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    # float32: bfloat16 cannot tell position 257 from 256.
    angles = positions[:, :, None, None].astype(jnp.float32) * inv_freq
    return Rotation(jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype))


def rotate(x: Float[Array, "B T N H"], by: Rotation) -> Float[Array, "B T N H"]:
    """`x` with each head turned."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * by.cos - second * by.sin, second * by.cos + first * by.sin], axis=-1)
