"""Length of a longest common subsequence, a bit per element of one of the two (Crochemore et al. 2001)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class Pattern:
    """A sequence that others are compared with."""

    def __init__(self, sequence: Sequence[int]) -> None:
        self.length = len(sequence)
        self._masks: dict[int, int] = {}
        for bit, element in enumerate(sequence):
            self._masks[element] = self._masks.get(element, 0) | 1 << bit

    def lcs(self, sequence: Iterable[int]) -> int:
        """Elements of a longest common subsequence with `sequence`."""
        whole = row = (1 << self.length) - 1
        masks = self._masks
        for element in sequence:
            if mask := masks.get(element):
                # Of each run of ones, which ends in a place where the subsequence can grow, the addition carries the
                # lowest match out of the run: a bit is 0 where the length rises by one.
                grown = row & mask
                row = ((row + grown) | (row - grown)) & whole
        return self.length - row.bit_count()
