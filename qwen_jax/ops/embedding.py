"""Token ids to vectors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from qwen_jax import sharding
from qwen_jax.ops import quantized
from qwen_jax.ops.quantized import Quantized


def embed(
    tokens: Int[Array, "B T"], table: Float[Array, "V D"] | Quantized, *, dtype: jnp.dtype
) -> Float[Array, "B T D"]:
    """The rows of `table` for `tokens`, in `dtype`. Ids outside the table give NaN: nothing is clamped in silence.

    The table is split over vocabulary and width. Each device looks up the ids it holds and the rest arrive by a
    sum over `tensor`; a gather left to the partitioner makes it rebuild the whole activation on every device. A
    quantised table is whole along fsdp, and has no gradient.
    """
    ids = sharding.activation("bt", tokens.shape)
    if isinstance(table, Quantized):
        split, gathered = quantized.split(sharding.gathered("vd", table.shape), 1, table), None
        table = jax.tree.map(jax.sharding.reshard, table, split)
    else:
        split = sharding.weight("vd", table.shape)
        gathered = sharding.fsdp_dimension(split)
        table = jax.sharding.reshard(table.astype(dtype), split)
    size = table.shape[0] // sharding.axis_size("tensor")

    def look_up(tokens, rows):
        local = tokens - jax.lax.axis_index("tensor") * size
        held = (local >= 0) & (local < size)
        local = jnp.where(held, local, 0)
        if isinstance(rows, Quantized):
            vectors = quantized.look_up(local, rows, dtype=dtype)
        else:
            rows = sharding.all_gather(rows, axis=gathered)
            vectors = rows.at[local].get(mode="promise_in_bounds")
        return jax.lax.psum(jnp.where(held[..., None], vectors, 0), "tensor")

    # Replication is checked by the tests on meshes: the checker knows no gathers in stages.
    vectors = jax.shard_map(look_up, in_specs=(ids, split), out_specs=P(*ids, None), check_vma=False)(tokens, table)
    known = (tokens >= 0) & (tokens < table.shape[0])
    return jnp.where(known[..., None], vectors, jnp.nan)
