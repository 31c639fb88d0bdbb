"""Root-mean-square normalisation (Zhang and Sennrich, 2019)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "*rows D"], scale: Float[Array, " D"], *, eps: float) -> Float[Array, "*rows D"]:
    """`x / sqrt(mean(x^2) + eps) * scale`, in x's dtype.

    The normalisation is in float32, the product with `scale` in x's dtype: the order of the published models.
    """
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * scale.astype(x.dtype)
