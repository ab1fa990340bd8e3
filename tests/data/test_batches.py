from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effitrain.data.batches import Batches
from effitrain.data.tokenized import IGNORE, Sample, TokenSet, join


def token_set(lengths, seed=0):
    """Samples whose ids are all different, so that every token tells where it came from."""
    source = np.random.Generator(np.random.Philox(key=seed))
    ids = np.split(np.arange(sum(lengths), dtype=np.int32), np.cumsum(lengths)[:-1])
    return join([Sample(part, source.random(len(part)) < 0.6) for part in ids])


def sample_of(tokens, ids):
    """Which sample a segment is, checked to be whole."""
    row = int(np.searchsorted(tokens.offsets, int(ids[0]), "right")) - 1
    assert ids.tolist() == tokens.input_ids[tokens.offsets[row] : tokens.offsets[row + 1]].tolist()
    return row


def epoch_of(batches, epoch):
    return [batches.get(i) for i in range(epoch * batches.per_epoch, (epoch + 1) * batches.per_epoch)]


@given(
    st.lists(st.integers(2, 12), min_size=1, max_size=30), st.integers(1, 5), st.booleans(), st.integers(0, 2**63 - 1)
)
@settings(deadline=None, max_examples=60, derandomize=True)
def test_an_epoch_has_every_sample_once_with_its_labels_and_positions(lengths, batch_size, packing, seed):
    tokens = token_set(lengths)
    batches = Batches(tokens, batch_size, 12, packing, seed)
    seen = []
    for batch in epoch_of(batches, 3):
        edges = np.cumsum([0, *batch.segments])
        assert edges[-1] == len(batch.input_ids) == len(batch.labels) == len(batch.position_ids)
        assert batch.input_ids.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64
        assert batch.samples == len(batch.segments)
        assert batch.trained_tokens == int((batch.labels != IGNORE).sum())
        for start, end in pairwise(edges):
            row = sample_of(tokens, batch.input_ids[start:end])
            seen.append(row)
            assert batch.position_ids[start:end].tolist() == list(range(end - start))
            expected = [*tokens.labels[tokens.offsets[row] + 1 : tokens.offsets[row + 1]].tolist(), IGNORE]
            assert batch.labels[start:end].tolist() == expected
    assert sorted(seen) == list(range(len(lengths)))


def test_without_packing_a_micro_batch_is_batch_size_samples_and_the_last_one_is_kept():
    batches = Batches(token_set([5] * 10), 4, 12, False, 0)
    assert batches.per_epoch == 3
    assert [batch.samples for batch in epoch_of(batches, 0)] == [4, 4, 2]


def test_packed_rows_hold_no_more_than_the_length():
    tokens = token_set([7, 3, 6, 6, 2, 5, 9, 1, 4])
    batches = Batches(tokens, 1, 10, True, 0)
    sizes = [len(batch.input_ids) for batch in epoch_of(batches, 0)]
    assert max(sizes) <= 10
    assert len(sizes) == 5  # first-fit decreasing: 9+1, 7+3, 6+4, 6+2, 5
    assert Batches(tokens, 2, 10, True, 0).per_epoch == 3


def test_get_is_a_pure_function_of_the_index():
    tokens = token_set([3, 4, 5, 6, 7, 8, 9])
    first = Batches(tokens, 2, 12, False, 42)
    forward = [first.get(i).input_ids.tolist() for i in range(12)]
    second = Batches(tokens, 2, 12, False, 42)
    assert [second.get(i).input_ids.tolist() for i in reversed(range(12))] == forward[::-1]


def test_the_order_depends_on_seed_and_epoch():
    tokens = token_set([2] * 50)

    def order(seed, epoch):
        return torch.cat([batch.input_ids for batch in epoch_of(Batches(tokens, 4, 12, False, seed), epoch)]).tolist()

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(*key)) for key in [(1, 0), (1, 1), (2, 0), (0, 1), (2**63 - 1, 0)]}) == 5


def test_the_order_is_the_same_on_every_machine():
    batches = Batches(token_set([2] * 8), 8, 12, False, 42)
    assert [ids // 2 for ids in batches.get(0).input_ids[::2].tolist()] == [7, 1, 6, 4, 3, 5, 0, 2]


@pytest.mark.parametrize("packing", [False, True])
def test_the_longest_has_at_least_the_tokens_of_any(packing):
    tokens = token_set([3, 9, 5, 11, 2, 12, 4, 4, 7])
    batches = Batches(tokens, 3, 12, packing, 0)
    biggest = batches.longest
    assert len(biggest.input_ids) >= max(len(batches.get(i).input_ids) for i in range(10 * batches.per_epoch))
    if not packing:
        assert biggest.segments == (12, 11, 9)


@pytest.mark.parametrize("packing", [False, True])
def test_the_most_trained_tokens_of_any(packing):
    tokens = token_set([3, 9, 5, 11, 2, 12, 4, 4, 7], seed=3)
    tokens.labels[tokens.offsets[:-1]] = IGNORE  # as of any sample's first token
    batches = Batches(tokens, 3, 12, packing, 0)
    seen = max(batches.get(i).trained_tokens for i in range(200 * batches.per_epoch))
    assert batches.most_trained == seen


def test_what_is_not_there():
    empty = TokenSet(np.empty(0, np.int32), np.empty(0, np.int32), np.zeros(1, np.int64))
    for packing in (False, True):
        batches = Batches(empty, 4, 12, packing, 0)
        assert batches.per_epoch == 0
        with pytest.raises(IndexError):
            batches.get(0)
        with pytest.raises(ValueError, match="empty"):
            _ = batches.longest
    with pytest.raises(IndexError):
        Batches(token_set([3]), 4, 12, False, 0).get(-1)
