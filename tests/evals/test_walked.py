"""The loss of a model that passes layer by layer is that of the resident one, whatever memory its text may take."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from effitrain.core.recipe import Recipe
from effitrain.data.batches import Batches
from effitrain.data.tokenized import IGNORE, TokenSet
from effitrain.evals import walked
from effitrain.evals.perplexity import evaluate_loss
from effitrain.model.decoder import build
from effitrain.model.load import fill, find_base
from effitrain.model.walk import Walk, grouped

CPU, LAYERS, HIDDEN = torch.device("cpu"), 3, 64
LONGEST = 34  # tokens of a micro-batch: two samples of 17


@pytest.fixture
def batches():
    """Five micro-batches of up to two samples of 17 or 9 tokens, the first four of every sample not trained."""
    offsets = np.concatenate([[0], np.cumsum([17, 9, 17, 9, 17, 9, 17, 9, 17])])
    ids = np.random.default_rng(5).integers(0, 261, offsets[-1]).astype(np.int32)
    labels = ids.copy()
    for start in offsets[:-1]:
        labels[start : start + 4] = IGNORE
    return Batches(TokenSet(ids, labels, offsets), 2, 32, False, 0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("tokens", "passes"), [(1000, 1), (60, 3), (1, 5)])
def test_a_bound_changes_passes_and_not_the_loss(tiny_model, batches, monkeypatch, tokens, passes, tied):
    """float32: layers and head get the same numbers either way."""
    base = find_base(str(tiny_model("llama", tied=tied, layers=LAYERS))).fetched()
    resident = fill(build(base.spec, base.source.config, "x"), base.weights(), "none", torch.float32, CPU)
    visits, started = [], []
    layer, start = Walk.layer, Walk.start
    monkeypatch.setattr(Walk, "layer", lambda walk, index: visits.append(index) or layer(walk, index))
    monkeypatch.setattr(
        Walk, "start", lambda walk, group: started.append(sum(len(b.input_ids) for b in group)) or start(walk, group)
    )
    monkeypatch.setattr(walked, "_HIDDEN_STATES", tokens * HIDDEN * 4)
    found = walked.evaluate_walked(base, Recipe(quant="none", dtype="fp32"), CPU, batches)
    expected = evaluate_loss(resident, batches)
    assert found.tokens == expected.tokens and found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert visits == list(range(LAYERS)) * passes and sum(started) == batches.token_set.offsets[-1]
    assert max(started) <= max(tokens, LONGEST)


def test_groups_hold_all_in_order(batches):
    every = [batches.get(index) for index in range(batches.per_epoch)]
    for tokens in (1, 26, 51, 52, 53, 500):
        groups = list(grouped(every, tokens))
        assert [one for group in groups for one in group] == every and all(groups)
        sizes = [[len(one.input_ids) for one in group] for group in groups]
        assert all(sum(size) <= tokens or len(size) == 1 for size in sizes)
        assert all(sum(a) + b[0] > tokens for a, b in pairwise(sizes))  # no smaller than need be
    assert list(grouped([], 5)) == []
