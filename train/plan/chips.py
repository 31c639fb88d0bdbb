"""TPU generations as data: what a chip can do, and in which shapes chips come.

Rates, HBM and links are Google's published figures (cloud.google.com/tpu/docs: v4, v5e, v5p, v6e, tpu7x), a link with
the 90 % of them that programs see (How to Scale Your Model, 2025, chapter 2). What a program may use of HBM is what
libtpu 0.0.42 says when one needs more. The clock is the peak rate over the operations of a cycle.
"""

from __future__ import annotations

import dataclasses

GIB = 2**30

# Bytes per second of a chip to another slice, over the data centre's network: 50 Gbit/s of a v5p, assumed for all.
BETWEEN_SLICES = 6.25e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One chip of a generation.

    Attributes:
      name: as in "v5e:16x16" and "v5e-256".
      accelerator: what Cloud TPU calls it in accelerator types, such as "v5litepod-256".
      cores: how many that number counts per chip.
      flops: bfloat16 operations per second.
      hbm: bytes that a program may use.
      bandwidth: bytes per second of HBM.
      link: bytes per second to a neighbour, in one direction.
      clock: cycles per second.
      shapes: the slices there are: chips along each axis.
      libtpu: its name there.
      mode: how libtpu is to use the cores.
      devices: JAX devices per chip, each with its part of the rates and of HBM.
    """

    name: str
    accelerator: str
    cores: int
    flops: float
    hbm: float
    bandwidth: float
    link: float
    clock: float
    shapes: tuple[tuple[int, ...], ...]
    libtpu: str
    mode: str = "default"
    devices: int = 1


def _shapes(text: str) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(map(int, shape.split("x"))) for shape in text.split())


_FLAT = _shapes("1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16")
_CUBIC = _shapes("2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x12 8x8x16 8x16x16")

# fmt: off
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(name="v4", accelerator="v4", cores=2, libtpu="v4", mode="megacore", shapes=_CUBIC,
             flops=275e12, hbm=30.75 * GIB, bandwidth=1.2e12, link=45e9, clock=1.05e9),
        Chip(name="v5e", accelerator="v5litepod", cores=1, libtpu="v5e", shapes=_FLAT,
             flops=197e12, hbm=15.75 * GIB, bandwidth=0.819e12, link=45e9, clock=1.5e9),
        Chip(name="v5p", accelerator="v5p", cores=2, libtpu="v5p", shapes=(*_CUBIC, (16, 16, 16), (16, 16, 24)),
             flops=459e12, hbm=95.74 * GIB, bandwidth=2.765e12, link=90e9, clock=1.75e9),
        Chip(name="v6e", accelerator="v6e", cores=1, libtpu="v6e", shapes=_FLAT,
             flops=918e12, hbm=31.25 * GIB, bandwidth=1.638e12, link=90e9, clock=1.75e9),
        Chip(name="v7x", accelerator="tpu7x", cores=2, libtpu="tpu7x", shapes=_CUBIC, devices=2,
             flops=2307e12, hbm=2 * 94.75 * GIB, bandwidth=7.4e12, link=90e9, clock=2.2e9),
    )
}
# fmt: on
