"""From scores to kept groups."""

import itertools

import pytest
import torch

from effitrain.core.errors import InputError
from effitrain.core.keep import LayerKeep
from effitrain.core.spec import Axis, Widths
from effitrain.pruning.select import select, shared_out


def test_the_highest_scores_stay_in_order(model):
    spec = model(ffn=6).spec
    scores = {
        0: {Axis.FFN: torch.tensor([0.0, 5, 1, 4, 2, 3]), Axis.KV_HEADS: torch.tensor([1.0, 2])},
        1: {Axis.FFN: torch.tensor([9.0, 0, 0, 0, 0, 8])},
    }
    kept = select(spec, [Widths(3, 1), Widths(2, 2)], scores)
    assert kept == [LayerKeep((1, 3, 5), (1,)), LayerKeep((0, 5), (0, 1))]


def test_of_equal_scores_the_first_stay(model):
    spec = model(ffn=6).spec
    scores = {index: {Axis.FFN: torch.ones(6)} for index in range(2)}
    assert select(spec, [Widths(4, 2)] * 2, scores)[0].ffn == (0, 1, 2, 3)


def test_layers_that_lose_nothing_need_no_scores(model):
    spec = model(ffn=6).spec
    assert select(spec, spec.widths, {}) == [LayerKeep(tuple(range(6)), (0, 1))] * 2


def test_nan_is_refused(model):
    spec = model(ffn=6).spec
    scores = {index: {Axis.FFN: torch.tensor([1.0, 2, 3, 4, 5, torch.nan])} for index in range(2)}
    with pytest.raises(InputError, match=r"layer 0 .* not a number"):
        select(spec, [Widths(3, 2)] * 2, scores)


def standardised(values):
    return ((values - values.mean()) / values.std()).sort(descending=True).values


@pytest.mark.parametrize("seed", range(4))
def test_layers_share_what_is_kept_so_that_the_scores_kept_add_up_to_the_most(model, seed):
    """Against every possible way to share, in runs of two channels, whatever the size of a layer's scores."""
    spec, random = model(ffn=6, layers=3, heads=8, kv_heads=4).spec, torch.Generator().manual_seed(seed)
    scores = {
        index: {
            Axis.FFN: 10.0**index * torch.rand(6, generator=random) ** 3,
            Axis.KV_HEADS: torch.rand(4, generator=random) ** 3,
        }
        for index in range(3)
    }
    widths = [Widths(4, 2), Widths(6, 4), Widths(2, 2)]  # the second layer is exempt
    shared = shared_out(spec, widths, scores, 2)
    assert shared[1] == widths[1] and sum(w.ffn for w in shared) == 12 and sum(w.kv_heads for w in shared) == 8
    for part, sizes, pick in ((Axis.FFN, (2, 4, 6), lambda w: w.ffn), (Axis.KV_HEADS, (1, 2, 3), lambda w: w.kv_heads)):
        total = pick(widths[0]) + pick(widths[2])

        def worth(first, last, part=part):
            return sum(standardised(scores[i][part])[:n].sum().item() for i, n in ((0, first), (2, last)))

        possible = [pair for pair in itertools.product(sizes, sizes) if sum(pair) == total]
        assert (pick(shared[0]), pick(shared[2])) == max(possible, key=lambda pair: worth(*pair))


def test_equal_scores_are_shared_alike_every_time(model):
    spec = model(ffn=8, layers=3).spec
    scores = {index: {Axis.FFN: torch.ones(8), Axis.KV_HEADS: torch.ones(2)} for index in range(3)}
    widths = [Widths(4, 1)] * 3
    assert shared_out(spec, widths, scores, 2) == shared_out(spec, widths, scores, 2)
    assert [w.kv_heads for w in shared_out(spec, widths, scores, 2)] == [1, 1, 1]
    assert min(w.ffn for w in shared_out(spec, widths, scores, 2)) >= 2


def test_nan_is_refused_across_layers_too(model):
    scores = {index: {Axis.FFN: torch.full((6,), torch.nan), Axis.KV_HEADS: torch.ones(2)} for index in range(2)}
    with pytest.raises(InputError, match=r"layer 0 .* not a number"):
        shared_out(model(ffn=6).spec, [Widths(4, 2)] * 2, scores, 2)
