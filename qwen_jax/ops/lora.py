"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685): two thin matrices are trained in place of a weight."""

from __future__ import annotations

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from qwen_jax.ops.dropout import Dropout
from qwen_jax.ops.quantized import Quantized


@typing.no_type_check  # at run time: stacks of layers have an axis more
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapted:
    """What stands in the place of a weight w: as a product with it, plus `scale` times that with a and then with b.

    Attributes:
      w: as stored, of any kind that `ops.linear.contract` knows. Frozen: it has no gradient.
      a: [r, inputs].
      b: [outputs, r].
      dropout: of what a is multiplied with, in training.
      scale: alpha / r in the paper.
    """

    w: Array | Quantized | Adapted
    a: Float[Array, "r ..."]
    b: Float[Array, "... r"]
    dropout: Dropout | None = None
    scale: float = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.w.shape

    def fold(self, number: Int[Array, ""]) -> Adapted:
        """With other dropout, for the part `number` of the tokens."""
        return dataclasses.replace(self, dropout=self.dropout and self.dropout.fold(number))


def merged(w: Float[Array, "..."], a: Float[Array, "..."], b: Float[Array, "..."], scale: float) -> Float[Array, "..."]:
    """The weight that an adapter makes of one, in the dtype and split of w; of one layer, or of a stack of them."""
    if a.ndim + b.ndim > w.ndim + 2:  # each has a first axis of layers
        return jax.vmap(lambda w, a, b: merged(w, a, b, scale))(w, a, b)
    outputs, split = b.ndim - 1, jax.typeof(w).sharding.spec
    a = jax.sharding.reshard(a, P(None, *split[outputs:]))
    b = jax.sharding.reshard(b, P(*split[:outputs], None))
    change = jnp.tensordot(b, a, axes=1, precision=jax.lax.Precision.HIGHEST)
    return (w.astype(jnp.float32) + scale * change.astype(jnp.float32)).astype(w.dtype)
