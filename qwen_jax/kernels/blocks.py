"""Sizes of the blocks of `flash_attention`, per generation of TPU."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

Generation = Literal["v4", "v5e", "v5p", "v6e", "v7x"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """Powers of two, at least 128. Lengths need not be multiples of them.

    Attributes:
      block_q: queries in a block, those of several heads counted together.
      block_kv: keys that are in VMEM at once.
      block_kv_compute: keys that are computed at once; their scores with a block of queries are in VMEM.
      backward_...: the same, of the backward pass.
    """

    block_q: int
    block_kv: int
    block_kv_compute: int
    backward_block_q: int
    backward_block_kv: int
    backward_block_kv_compute: int

    def __post_init__(self):
        for field, size in dataclasses.asdict(self).items():
            if size < 128 or size & (size - 1):
                raise ValueError(f"{field}={size} must be a power of two and at least 128")
        for prefix in ("", "backward_"):
            outer, inner = getattr(self, prefix + "block_kv"), getattr(self, prefix + "block_kv_compute")
            if inner > outer:
                raise ValueError(f"{prefix}block_kv_compute={inner} must not exceed {prefix}block_kv={outer}")


# For head_dim 128 in bfloat16.
_TUNED = {
    generation: Blocks(
        block_q=1024,
        block_kv=4096,
        block_kv_compute=512,
        backward_block_q=512,
        backward_block_kv=4096,
        backward_block_kv_compute=512,
    )
    for generation in get_args(Generation)
}
# Of 256, 512 and 1024 the fewest bundles at 4096 and at 32768 tokens (docs/kernels.md).
_TUNED["v5p"] = dataclasses.replace(_TUNED["v5p"], backward_block_kv_compute=256)


def tuned(generation: str | None, *, head_dim: int, itemsize: int) -> Blocks:
    """The fastest blocks known for a generation of TPU; fewer keys at once where a row of them is long.

    Args:
      itemsize: bytes of a number.

    Raises:
      ValueError: the generation is not one of `Generation`.
    """
    if generation not in _TUNED:
        raise ValueError(f"generation={generation!r} is none of {', '.join(_TUNED)}; or give blocks")
    # In VMEM a row takes whole registers of 128 lanes.
    times = -(-head_dim // 128) * itemsize // 2
    blocks, wider = _TUNED[generation], 1 << (times - 1).bit_length()
    return dataclasses.replace(
        blocks,
        block_kv=max(blocks.block_kv // wider, blocks.block_kv_compute),
        backward_block_kv=max(blocks.backward_block_kv // wider, blocks.backward_block_kv_compute),
    )
