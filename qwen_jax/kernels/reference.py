"""The slow twin of `flash_attention`: the formula, with every score of [T, S] in memory. The oracle of its tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def reference(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    *,
    scale: float,
    query_segments: Int[Array, "B T"] | None = None,
    key_segments: Int[Array, "B S"] | None = None,
    window: Int[Array, ""] | int | None = None,
    query_offset: Int[Array, "*B"] | int = 0,
    query_scale: Float[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B N T H"], Float[Array, "B N T"]]:
    """Output and log-sum-exp, as `flash_attention` defines them; float32 throughout, the output in q's dtype."""
    group, (length, keys) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
    k, v = (jnp.repeat(x, group, axis=1).astype(jnp.float32) for x in (k, v))
    offset = jnp.broadcast_to(jnp.asarray(query_offset, jnp.int32), q.shape[:1])
    distance = offset[:, None, None] + jnp.arange(length)[:, None] - jnp.arange(keys)
    seen = distance >= 0
    if window is not None:
        seen &= (distance < window) | (jnp.asarray(window) <= 0)
    if query_segments is not None and key_segments is not None:
        seen &= (query_segments[:, :, None] == key_segments[:, None]) & (key_segments[:, None] != 0)
    seen, any_seen = seen[:, None], seen.any(-1)[:, None]
    factor = scale if query_scale is None else scale * query_scale[:, None, :, None]
    scores = jnp.einsum("bnth,bnsh->bnts", q.astype(jnp.float32) * factor, k)
    # The row's own values where it sees nothing: no -inf - -inf, whose gradient is NaN.
    lse = jnp.where(
        any_seen, jax.nn.logsumexp(jnp.where(seen | ~any_seen[..., None], scores, -jnp.inf), axis=-1), -1e30
    )
    probs = jnp.where(seen, jnp.exp(jnp.where(seen, scores - lse[..., None], 0.0)), 0.0)
    return jnp.einsum("bnts,bnsh->bnth", probs, v).astype(q.dtype), lse
