"""Packing: samples into as few rows as first-fit decreasing finds."""

import numpy as np
from numpy.typing import NDArray


def first_fit_decreasing(lengths: NDArray[np.int64], capacity: int) -> list[NDArray[np.int64]]:
    """Bins of at most ``capacity`` tokens: the longest sample first, each into the first bin with room for it.

    Args:
        lengths: tokens of each sample, int64 [n].
        capacity: tokens of a bin.

    Returns:
        The samples of each bin, by index into ``lengths``; equal lengths keep their order.

    Raises:
        ValueError: a sample is longer than ``capacity``.
    """
    if len(lengths) and lengths.max() > capacity:
        raise ValueError(f"a sample of {lengths.max()} tokens does not fit in rows of {capacity}")
    order = np.argsort(-lengths, kind="stable")
    bin_of = _first_fit(lengths[order].tolist(), capacity)
    by_bin = np.argsort(bin_of, kind="stable")
    return np.split(order[by_bin], np.cumsum(np.bincount(bin_of))[:-1])


def _first_fit(lengths: list[int], capacity: int) -> NDArray[np.int64]:
    """The bin of each length in turn, through a tree of maxima over the room left in the bins: O(n log n)."""
    leaves = 1 << max(1, len(lengths) - 1).bit_length()
    # room[i] is the larger of room[2 * i] and room[2 * i + 1]; the bins are the leaves.
    room = [capacity] * (2 * leaves)
    bins = np.empty(len(lengths), np.int64)
    for item, length in enumerate(lengths):
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < length:
                node += 1
        bins[item] = node - leaves
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return bins
