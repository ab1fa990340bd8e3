"""From scores to kept groups."""

import pytest
import torch

from effitrain.core.errors import InputError
from effitrain.core.keep import LayerKeep
from effitrain.core.spec import Axis, Widths
from effitrain.pruning.select import select


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
