"""The devices that a run is planned for, by the names people have for them."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

from qwen_jax.errors import ConfigError
from train.plan.chips import BETWEEN_SLICES, CHIPS, Chip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """TPU slices, all of one shape.

    Attributes:
      chip: the generation.
      shape: chips along each axis of a slice.
      slices: how many, joined by the data centre's network.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def num_chips(self) -> int:
        """Chips of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def num_devices(self) -> int:
        """JAX devices of all slices."""
        return self.num_chips * self.chip.devices

    @property
    def flops(self) -> float:
        """Operations per second of one device."""
        return self.chip.flops / self.chip.devices

    @property
    def hbm(self) -> float:
        """Bytes that a program may use of one device's HBM."""
        return self.chip.hbm / self.chip.devices

    @property
    def bandwidth(self) -> float:
        """Bytes per second of one device's HBM."""
        return self.chip.bandwidth / self.chip.devices

    @property
    def label(self) -> str:
        """One slice, as `parse` reads it."""
        return f"{self.chip.name}:{_by(self.shape)}"

    @property
    def libtpu(self) -> str:
        """One slice, as libtpu reads it."""
        return f"{self.chip.libtpu}:{_by(self.shape)}"

    def __str__(self) -> str:
        return f"{self.slices} x {self.label}" if self.slices > 1 else self.label

    def larger(self, num_devices: float) -> Topology | None:
        """The smallest slice of this chip with at least so many devices; None where there is none."""
        all_shapes = [Topology(chip=self.chip, shape=shape) for shape in self.chip.shapes]
        return next((topology for topology in all_shapes if topology.num_devices >= num_devices), None)

    def rate(self, places: Sequence[tuple[int, ...]]) -> float:
        """Bytes per second that each of a group of devices can receive of a collective among them.

        Args:
          places: slice number and coordinates in the slice of each device.
        """
        slices = len({place[0] for place in places})
        spans = [len({place[1 + axis] for place in places}) for axis in range(len(self.shape))]
        within = self.rate_along(spans)
        # What goes to other slices is divided among the devices of the group in each.
        return min(within, BETWEEN_SLICES / self.chip.devices * len(places) / slices) if slices > 1 else within

    def rate_along(self, spans: Sequence[int]) -> float:
        """As `rate`, within a slice, of a group that spans so many chips along each axis, all axes used at once."""
        # Round a ring in both directions; or to and fro, where the ends are not linked.
        links = sum(
            2 if span == size and self._wraps(size) else 1
            for span, size in zip(spans, self.shape, strict=True)
            if span > 1
        )
        return links * self.chip.link / self.chip.devices if links else self.bandwidth

    def _wraps(self, size: int) -> bool:
        """Whether the last chip along an axis of this size is linked to the first."""
        return size == 16 if len(self.shape) == 2 else size % 4 == 0


def parse(text: str, *, slices: int = 1) -> Topology:
    """The topology of "v5p:4x4x8", or of an accelerator type, such as "v5p-256" (two cores per chip: 128 chips).

    Raises ConfigError, with the names that exist.
    """
    if slices < 1:
        raise ConfigError(f"--slices {slices} must be at least 1")
    match = re.fullmatch(r"([a-z]+\d[a-z]*)(?::([\dx]+)|-(\d{1,6}))", text)
    kinds = {name: chip for chip in CHIPS.values() for name in (chip.name, chip.accelerator)}
    if not match or match[1] not in kinds:
        known = ", ".join(CHIPS)
        raise ConfigError(f"no topology {text!r:.60}; write a chip ({known}) and its shape, such as v5p:4x4x8")
    chip = kinds[match[1]]
    if match[2]:
        found = {_by(shape): shape for shape in chip.shapes}
        if match[2] not in found:
            raise ConfigError(f"{chip.name} has no topology {match[2]:.60}; it has {', '.join(found)}")
        return Topology(chip=chip, shape=found[match[2]], slices=slices)
    sizes = {math.prod(shape) * chip.cores: shape for shape in chip.shapes}
    if int(match[3]) not in sizes:
        there = ", ".join(f"{chip.accelerator}-{size}" for size in sizes)
        raise ConfigError(f"no accelerator type {text!r:.60}; there is {there}")
    return Topology(chip=chip, shape=sizes[int(match[3])], slices=slices)


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
