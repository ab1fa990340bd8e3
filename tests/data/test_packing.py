import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effitrain.data.packing import first_fit_decreasing


def naive(lengths, capacity):
    """First-fit decreasing as the textbook has it."""
    bins, room = [], []
    for sample in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [i for i, left in enumerate(room) if left >= lengths[sample]]
        if not fitting:
            bins.append([])
            room.append(capacity)
        number = fitting[0] if fitting else len(bins) - 1
        bins[number].append(sample)
        room[number] -= lengths[sample]
    return bins


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(20, 40))
@settings(deadline=None, max_examples=200, derandomize=True)
def test_equals_the_naive_algorithm(lengths, capacity):
    packed = first_fit_decreasing(np.array(lengths), capacity)
    assert [list(samples) for samples in packed] == naive(lengths, capacity)


def test_a_realistic_set_is_packed_tightly():
    lengths = np.minimum(2048, np.random.Generator(np.random.Philox(key=1)).lognormal(5, 1, 3000).astype(np.int64) + 2)
    packed = first_fit_decreasing(lengths, 2048)
    assert sorted(np.concatenate(packed)) == list(range(3000))
    assert max(lengths[samples].sum() for samples in packed) <= 2048
    assert len(packed) <= 1.01 * np.ceil(lengths.sum() / 2048) + 1


def test_fifty_thousand_samples_take_seconds():
    lengths = np.random.Generator(np.random.Philox(key=2)).integers(10, 2000, 50_000)
    start = time.process_time()
    packed = first_fit_decreasing(lengths, 2048)
    assert time.process_time() - start < 5  # 0.8 s measured; the quadratic algorithm takes minutes
    assert sum(map(len, packed)) == 50_000


def test_a_sample_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="a sample of 9 tokens does not fit in rows of 8"):
        first_fit_decreasing(np.array([3, 9]), 8)
