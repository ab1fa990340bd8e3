"""Resident layers spread evenly; every count is kept; impossible ones are refused."""

from itertools import pairwise

import pytest

from effitrain.core.placement import place


@pytest.mark.parametrize("layers", [1, 2, 7, 80])
def test_counts_are_kept_and_gaps_are_even(layers):
    for resident in range(layers + 1):
        for disk in {0, (layers - resident) // 2, layers - resident}:
            placed = place(layers, resident, slots=2, disk_layers=disk)
            assert len(placed.resident) == resident and len(placed.streamed) == layers - resident
            assert len(placed.on_disk) == disk and placed.on_disk <= set(placed.streamed)
            assert sorted({*placed.resident, *placed.on_disk, *placed.in_host_memory}) == list(range(layers))
            assert placed.slots == min(2, layers - resident)
            edges = [-1, *sorted(placed.resident), layers]
            gaps = [b - a for a, b in pairwise(edges[1:-1])]
            assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("wrong", [(4, 5, 2, 0), (4, -1, 2, 0), (4, 2, 2, 3), (4, 2, 0, 0), (4, 2, 2, -1)])
def test_impossible_counts_are_refused(wrong):
    with pytest.raises(ValueError, match="layers"):
        place(*wrong)
