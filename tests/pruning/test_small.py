"""The stages together: what is gone on with after an interruption, what is refused, what is left."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from effitrain.core.errors import InputError, Interrupted
from effitrain.core.recipe import make_recipe
from effitrain.planning import at_positions
from effitrain.pruning.calibration import Calibration
from effitrain.pruning.small import make_small
from effitrain.quant.nf4 import dequantize

from .conftest import CPU


@pytest.fixture
def make(model, text, tmp_path):
    """``make(train, tell, **fields)``: the small model of a random one by a training that is given."""
    full = model("llama", heads=8, kv_heads=2, layers=3)
    calibration = Calibration(tuple(text(12)), "text")

    def call(train, tell=lambda note: None, **fields):
        recipe = make_recipe(
            {"model": str(full.folder), "fit": "prune", "prune_ratio": 0.5, "prune_score": "magnitude",
             "align": "train", "dtype": "fp32", "max_seq_len": 32, **fields}
        )  # fmt: skip
        return make_small(full.base.fetched(), recipe, lambda: calibration, CPU, tmp_path / "small", tell, train)

    return call


def add_one(model, out):
    """A training that adds one to the last norm and halves a matrix."""
    shutil.copytree(model, out / "model")
    tensors = load_file(out / "model/model.safetensors")
    tensors["model.norm.weight"] += 1
    tensors["model.layers.1.mlp.up_proj.weight"] *= 0.5
    save_file(tensors, out / "model/model.safetensors")
    return out / "model", {"steps": 1}


def interrupted(model, out):
    raise Interrupted("Stopped.")


def test_training_goes_on_from_the_model_that_was_cut_and_leaves_the_small_one_alone(make, tmp_path):
    with pytest.raises(Interrupted):
        make(interrupted)
    assert [path.name for path in tmp_path.iterdir()] == ["small-align"]
    file = tmp_path / "small-align/cut/model.safetensors"
    before, cut = file.stat().st_mtime_ns, load_file(file)

    def train(model, out):
        assert file.stat().st_mtime_ns == before  # not cut again
        return add_one(model, out)

    small = make(train)
    weights = small.base.weights()
    assert torch.equal(weights.read("model.norm.weight"), cut["model.norm.weight"] + 1)
    halved = dequantize(weights.read_nf4("model.layers.1.mlp.up_proj.weight"), torch.float32)
    original = cut["model.layers.1.mlp.up_proj.weight"]
    assert (halved - original / 2).norm() < 0.15 * (original / 2).norm()  # NF4 errs by 9 %
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_what_was_cut_by_other_choices_is_refused(make, tmp_path):
    with pytest.raises(Interrupted):
        make(interrupted)
    with pytest.raises(InputError, match="something else"):
        make(add_one, prune_ratio=0.25)
    assert (tmp_path / "small-align/cut").is_dir() and not (tmp_path / "small").exists()


def test_a_small_model_in_another_form_is_another_small_model(make):
    make(add_one)
    with pytest.raises(InputError, match="something else"):
        make(add_one, quant="none")


def test_other_positions_are_another_small_model_with_scores_of_its_own(model, text, tmp_path, monkeypatch):
    monkeypatch.setattr("effitrain.pruning.small.default_cache_dir", lambda: tmp_path / "cache/data")
    full = model("llama", heads=8, kv_heads=2, layers=3).base.fetched()
    asked = make_recipe(
        {"model": str(full.folder), "fit": "prune", "prune_ratio": 0.5, "align": "none", "dtype": "fp32"}
    )  # fmt: skip
    calibration = Calibration(tuple(text(12)), "text")

    def prune(name, **fields):
        base = full.at_positions(at_positions(asked.changed(**fields), full.source.config)[1])
        make_small(base, asked, lambda: calibration, CPU, tmp_path / name)
        return len([*(tmp_path / "cache/scores").iterdir()])

    assert [prune("plain"), prune("scaled", rope_factor=8.0), prune("again")] == [1, 2, 2]
    for other in ({"rope_factor": 8.0}, {"rope_factor": 2.0, "rope_scaling": "ntk"}):
        with pytest.raises(InputError, match="something else"):
            prune("plain", **other)


@pytest.mark.parametrize(("multiple", "same"), [(56, True), (1, False)])
def test_global_ranking_says_when_runs_are_too_coarse_for_it(make, multiple, same):
    """Of 112 channels in two layers: in runs of 56 every layer keeps its one run."""
    told = []
    chosen = {"align": "none", "prune_exempt": (0, 1), "prune_ranking": "global", "prune_round": multiple}
    small = make(None, told.append, **chosen)
    said = [note for note in told if "came out as local" in note]
    assert (len(small.keep.widths[:2]) == 2 and len(set(small.keep.widths[:2])) == 1) == same == bool(said)
    assert not said or (f"runs of {multiple} FFN channels" in said[0] and "smaller --prune-round" in said[0])
