"""What scoring and alignment take, against every storage that is alive while they work; what the plan makes of it."""

import numpy as np
import pytest
import torch
from shapes import preset

from effitrain.core.budget import MemoryBudget
from effitrain.core.cut import small_spec
from effitrain.core.keep import KeepMap
from effitrain.core.plan import make_plan
from effitrain.core.recipe import make_recipe
from effitrain.core.spec import Axis
from effitrain.core.stages import NEEDS, stages
from effitrain.data.batches import Batches
from effitrain.data.tokenized import TokenSet
from effitrain.model.decoder import build
from effitrain.model.load import find_base
from effitrain.model.walk import Walk
from effitrain.pruning.align import Aligner
from effitrain.pruning.bias import Biases
from effitrain.pruning.cut import CutWeights
from effitrain.pruning.score import needs, score_layers
from effitrain.pruning.select import select
from effitrain.train.memory import StorageTracker

GIB = 2**30
HERE = MemoryBudget(2**40, 2**40, 0, "cpu")
PARTS = (Axis.FFN, Axis.KV_HEADS)


def test_what_scores_need_is_what_their_files_say():
    assert {name: needs(name) for name in NEEDS} == NEEDS


@pytest.fixture(scope="module")
def base(tiny_model):
    return find_base(str(tiny_model("llama", layers=3, hidden=256, heads=8, kv_heads=2, ffn=1024))).fetched()


@pytest.fixture(scope="module")
def batches():
    """As much text as is looked at, in micro-batches of 2,048 tokens."""
    ids = np.random.default_rng(0).integers(0, 261, 18_432).astype(np.int32)
    every = Batches(TokenSet(ids, ids.copy(), np.arange(0, 18_433, 64)), 32, 64, False, 0)
    return [every.get(index) for index in range(every.per_epoch)]


def walk(base, weights=None):
    spec = weights.small_spec if weights else base.spec
    decoder = build(spec, base.source.config, base.name)
    return Walk(decoder, weights or base.weights(), "none", torch.float32, torch.device("cpu"))


def asked(**fields):
    return make_recipe({"fit": "prune", "prune_ratio": 0.5, "max_seq_len": 64, "prune_exempt": (0, 0), **fields})


def predicted(base, recipe, what):
    """Device and host together: on a CPU they are one. The process and the largest tensor are not tracked."""
    (stage,) = [s for s in stages(base.spec, small_spec(base.spec, recipe), recipe, HERE) if s.what == what]
    return stage.device + stage.host - GIB - 2 * base.spec.embedding_params * 4


@pytest.mark.parametrize("name", ["magnitude", "wanda", "flap", "taylor"])
def test_scoring_takes_what_is_predicted_at_most(base, batches, name):
    full = walk(base)
    with StorageTracker() as tracker:
        score_layers(name, full, range(3), PARTS, 0, batches)
    assert 1 <= predicted(base, asked(prune_score=name), "Scoring") / tracker.peak < 1.6


@pytest.mark.parametrize("align", ["lsq", "bias"])
def test_alignment_takes_what_is_predicted_at_most(base, batches, align):
    recipe = asked(prune_score="random", align=align)
    scores = score_layers("random", walk(base), range(3), PARTS, 0)
    widths = small_spec(base.spec, recipe).widths
    keep = KeepMap.of(base.spec, select(base.spec, widths, scores), "", "")
    cut = CutWeights(base.weights(), base.spec, keep)
    full, small = walk(base), walk(base, cut)
    with StorageTracker() as tracker:
        if align == "bias":
            Biases(full, keep, batches)
        else:
            aligner = Aligner(full, small, keep, batches)
            for name in cut.names():
                aligner(name, torch.empty(0))
    assert 1 <= predicted(base, recipe, "Alignment") / tracker.peak < 1.6


def plan(budget, **fields):
    return make_plan(preset("llama-70b"), make_recipe({"fit": "prune", "prune_ratio": 0.85, **fields}), budget)


def test_the_plan_tells_the_stages_and_refuses_what_does_not_fit():
    card = MemoryBudget(16 * GIB, 64 * GIB, GIB, "cuda")
    told = [reason for reason in plan(card).reasons if "before training takes" in reason]
    assert [reason.split()[0] for reason in told] == ["Scoring", "Alignment"] and plan(card).fits
    lean = MemoryBudget(16 * GIB, 7 * GIB, GIB, "cuda")
    refused = plan(lean, max_seq_len=512)
    assert not refused.fits and any("Alignment before training needs" in reason for reason in refused.reasons)
    assert plan(lean, max_seq_len=512, align="none", prune_score="random").fits


def test_training_every_weight_of_a_small_70b_is_refused_by_the_plan():
    refused = plan(MemoryBudget(24 * GIB, 64 * GIB, GIB, "cuda"), align="train")
    assert not refused.fits and "Training the small model before training needs" in " ".join(refused.reasons)


def test_nothing_is_staged_for_a_small_model_that_is_there():
    spec, small, recipe, budget = _pair()
    assert not stages(spec, small, recipe.changed(small_model="there", prune_exempt=None), budget)
    assert not stages(*_pair(weights="synthetic"))
    assert not stages(*_pair(prune_score="random", align="none")) and stages(*_pair())


def _pair(**fields):
    spec, recipe = preset("llama-70b"), asked(**fields)
    return spec, small_spec(spec, recipe), recipe, HERE
