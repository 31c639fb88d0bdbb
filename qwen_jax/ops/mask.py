"""Which keys a query may see, as a specification: no [T, S] array exists until an implementation needs one."""

from __future__ import annotations

import dataclasses
import typing

import jax
from jaxtyping import Array, Bool, Int

from qwen_jax.ops.dropout import Dropout

# A hidden score. Finite, so that a row that sees nothing (padding) has uniform probabilities instead of NaN.
HIDDEN = -1e30


@typing.no_type_check  # at run time: a mask of partition specs says how one of arrays is split
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask:
    """Causal attention within segments: query t sees key s when all that is given here allows it.

    Attributes:
      query_positions: [B, T], position of each query within its segment.
      key_positions: [B, S]; keys with a later position than the query's are hidden.
      query_segments, key_segments: [B, T] and [B, S], or None; tokens see only tokens of their own segment.
      window: int32 scalar, how many of the latest keys are visible, its own included; None for all.
      aligned: queries and keys are the same tokens in the same order (T == S), the one of the sequence, so that key
        s > t is hidden in any case; lets an implementation skip what lies above the diagonal.
      balanced: that order is the one of `sharding.balanced_columns`, which without a `context` axis is the same.
      band: the least and the most t - s that may be visible where aligned, None for any; lets an implementation skip
        more of what all else hides.
      dropout: of attention weights, in training; None for none.
      lengths: [B], tokens of each row's prompt, without padding, where sparse attention looks at them; None elsewhere.
    """

    query_positions: Int[Array, "B T"]
    key_positions: Int[Array, "B S"]
    query_segments: Int[Array, "B T"] | None = None
    key_segments: Int[Array, "B S"] | None = None
    window: Int[Array, ""] | None = None
    lengths: Int[Array, " B"] | None = None
    dropout: Dropout | None = None
    aligned: bool = dataclasses.field(default=False, metadata={"static": True})
    balanced: bool = dataclasses.field(default=False, metadata={"static": True})
    band: tuple[int, int | None] = dataclasses.field(default=(0, None), metadata={"static": True})

    def visible(self, queries: slice = slice(None), keys: slice = slice(None)) -> Bool[Array, "B T S"]:
        """The block of the mask for these queries and keys, as booleans."""
        query, key = self.query_positions[:, queries, None], self.key_positions[:, None, keys]
        seen = key <= query
        if self.window is not None:
            seen &= query - key < self.window
        if self.query_segments is not None and self.key_segments is not None:
            seen &= self.query_segments[:, queries, None] == self.key_segments[:, None, keys]
        return seen
