"""Whole documents into rows, nearly without padding: best fit, the longest first."""

from __future__ import annotations

import bisect

import numpy as np


def best_fit(lengths: np.ndarray, capacity: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which items go together into bins of `capacity`.

    Items are taken from the longest to the shortest, those of a length in an order drawn by `seed`, and each goes into
    the fullest bin that has room (best-fit decreasing; for documents, arXiv 2404.10830). Bins of equal room and items
    of equal length are handled together, so that the time is that of sorting, with memory for some numbers per item.

    Args:
      lengths: of the items, int [n], from 1 to `capacity`.

    Returns:
      The items bin by bin, int64 [n], and where each bin begins and the last ends among them, int64 [bins + 1].
    """
    drawn = np.random.default_rng(seed).permutation(len(lengths))
    items = drawn[np.argsort(-lengths[drawn], kind="stable")]
    sizes, counts = np.unique(-lengths, return_counts=True)
    bin_of = np.empty(len(lengths), np.int64)
    rooms: list[int] = []  # sizes of room there is, sorted
    bins: dict[int, list[np.ndarray]] = {}  # room -> the bins that have it, in stretches
    first = num_bins = 0

    def put(room: int, some: np.ndarray) -> None:
        if room and len(some):
            if room not in bins:
                bisect.insort(rooms, room)
            bins.setdefault(room, []).append(some)

    for size, left in zip((-sizes).tolist(), counts.tolist(), strict=True):
        while left:
            place = bisect.bisect_left(rooms, size)
            if place < len(rooms):
                room = rooms[place]
                open_bins = bins[room].pop()
                if not bins[room]:
                    del bins[room], rooms[place]
            else:
                room = capacity
                open_bins = np.arange(num_bins, num_bins - (-left // (capacity // size)))
                num_bins += len(open_bins)
            # As many into each as it takes, since what takes one of them becomes the fullest; the last may have room.
            each = room // size
            full = min(len(open_bins), left // each)
            filled = np.repeat(open_bins[:full], each)
            put(room - each * size, open_bins[:full])
            rest = open_bins[full:]
            if len(rest) and (some := left - full * each):
                filled = np.concatenate([filled, np.repeat(rest[:1], some)])
                put(room - some * size, rest[:1])
                rest = rest[1:]
            put(room, rest)
            bin_of[items[first : first + len(filled)]] = filled
            first, left = first + len(filled), left - len(filled)
    by_bin = items[np.argsort(bin_of[items], kind="stable")]
    return by_bin, np.concatenate([[0], np.cumsum(np.bincount(bin_of, minlength=num_bins))])
