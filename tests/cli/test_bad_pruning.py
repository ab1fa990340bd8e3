"""Pruning that cannot be: one message that names the cause, exit code 2, nothing half-written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

SMALL = ["--prune-exempt", "0,0", "--prune-score", "random", "--align", "none"]


@pytest.fixture(scope="module")
def full(tiny_model) -> Path:
    return tiny_model("llama", heads=8, kv_heads=2)


@pytest.fixture(scope="module")
def small(effitrain, full, rows, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("small") / "small"
    command = ["prune", "--model", full, "--prune-ratio", 0.5, *SMALL, "--dataset", rows]
    assert effitrain(*command, "-o", out).code == 0
    return out


RUN = ["run", "--fit", "prune", "--max-steps", 1, "--max-seq-len", 64]
# Name of a case: the flags of a run that prunes, words that the message must hold.
RUNS = {
    "negative ratio": (["--prune-ratio", -0.1], ("--prune-ratio", "-0.1")),
    "everything": (["--prune-ratio", 1], ("--prune-ratio", "1")),
    "more than everything": (["--prune-ratio", 1.2], ("--prune-ratio", "1.2")),
    "ratio that is a word": (["--prune-ratio", "half"], ("--prune-ratio", "half")),
    "unknown part": (["--prune-ratio", 0.5, "--prune-parts", "heads"], ("--prune-parts", "ffn+kv")),
    "unknown score": (["--prune-ratio", 0.5, "--prune-score", "snip"], ("--prune-score", "wanda")),
    "unknown alignment": (["--prune-ratio", 0.5, "--align", "lst"], ("--align", "lsq")),
    "unknown ranking": (["--prune-ratio", 0.5, "--prune-ranking", "all"], ("--prune-ranking", "global")),
    "ranking of loraprune": (
        ["--prune-ratio", 0.5, "--prune-method", "loraprune", "--prune-ranking", "global"],
        ("--prune-ranking is for --prune-method loram",),
    ),
    "exempt is one number": (["--prune-ratio", 0.5, "--prune-exempt", "3"], ("--prune-exempt", "4,2")),
    "exempt below zero": (["--prune-ratio", 0.5, "--prune-exempt", "1,-1"], ("--prune-exempt", "-1")),
    "every layer exempt": (["--prune-ratio", 0.5, "--prune-exempt", "1,1"], ("--prune-exempt 1,1", "none of the 2")),
    "rounding to nothing": (["--prune-ratio", 0.5, "--prune-round", 0], ("--prune-round", "0")),
    "no such calibration set": (
        ["--prune-ratio", 0.5, "--prune-exempt", "0,0", "--calib-dataset", "none.jsonl"],
        ("none.jsonl",),
    ),
    "no such small model": (["--small-model", "none"], ("There is no keep map none",)),
}


@pytest.mark.parametrize("name", RUNS)
def test_runs(effitrain, full, rows, name, tmp_path):
    flags, words = RUNS[name]
    answer = effitrain(*RUN, "--model", full, "--dataset", rows, *flags, "-o", tmp_path / "out")
    refused(answer, *words)
    assert not (tmp_path / "out/small").exists() and not (tmp_path / "out/adapter").exists()


def refused(answer, *words):
    assert answer.code == 2, answer
    assert "Traceback" not in answer.err and answer.err.count("effitrain: ") == 1
    for word in words:
        assert str(word) in answer.err, answer.err


def test_pruning_flags_without_pruning(effitrain, full, tmp_path):
    flags = ["--fit", "resident", "--prune-ratio", 0.5, "--align", "none", "-o", tmp_path / "out"]
    refused(effitrain("run", "--model", full, *flags), "--prune-ratio 0.5 is for --fit prune", "--align none is")


def test_the_verb_needs_a_ratio(effitrain, full, tmp_path):
    refused(effitrain("prune", "--model", full, "-o", tmp_path / "out"), "needs a ratio", "--prune-ratio 0.5")


def test_a_calibration_set_that_is_too_small(effitrain, full, tmp_path):
    (tmp_path / "few.jsonl").write_text('{"text": "a few words"}\n')
    command = ["prune", "--model", full, "--prune-ratio", 0.5, "--prune-exempt", "0,0"]
    answer = effitrain(*command, "--calib-dataset", tmp_path / "few.jsonl", "-o", tmp_path / "out")
    refused(answer, "tokens", "256", "--calib-dataset")
    assert not (tmp_path / "out").exists()


def test_a_target_that_holds_something_else(effitrain, full, small, rows, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there/notes.txt").write_text("mine")
    for target, ratio in ((tmp_path / "there", 0.5), (small, 0.25)):
        command = ["prune", "--model", full, "--prune-ratio", ratio, *SMALL, "--dataset", rows, "-o", target]
        refused(effitrain(*command), str(target), "something else")


def test_a_model_with_nan(effitrain, full, rows, tmp_path):
    shutil.copytree(full, tmp_path / "nan")
    tensors = load_file(tmp_path / "nan/model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, tmp_path / "nan/model.safetensors")
    chosen = ["--prune-ratio", 0.5, "--prune-exempt", "0,0", "--prune-score", "magnitude", "--align", "none"]
    command = ["prune", "--model", tmp_path / "nan", *chosen, "--dataset", rows]
    refused(effitrain(*command, "-o", tmp_path / "out"), "model.layers.1.mlp.up_proj", "NaN")


def test_a_family_without_a_known_structure(effitrain, full, rows, tmp_path):
    shutil.copytree(full, tmp_path / "other")
    config = json.loads((tmp_path / "other/config.json").read_text())
    (tmp_path / "other/config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    command = ["prune", "--model", tmp_path / "other", "--prune-ratio", 0.5, "--dataset", rows]
    refused(effitrain(*command, "-o", tmp_path / "out"), "gpt2", "Qwen3")


# Name of a case: how the files of a good recovery are spoilt, words that the message must hold.
RECOVERIES = {
    "no keep map": (
        lambda p: (p.small / "keep.safetensors").unlink(),
        ("no keep map", "Name keep.safetensors"),
    ),
    "damaged keep map": (lambda p: (p.small / "keep.safetensors").write_bytes(b"x"), ("not a keep map",)),
    "wrong base": (lambda p: p.change_base(), ("other weights", "--model")),
    "base of another shape": (lambda p: p.use_base("llama", heads=4, kv_heads=2), ("belongs to another model",)),
    "adapter of the full model": (lambda p: p.adapter_of(p.full), ("trained on another model",)),
    "no adapter": (lambda p: shutil.rmtree(p.adapter), ("adapter_config.json",)),
    "target that exists": (lambda p: p.target.mkdir() or (p.target / "x").write_text(""), ("exists already", "-o")),
}


class Place:
    """Copies of the files of a recovery, to be spoilt."""

    def __init__(self, effitrain, tiny_model, full, small, rows, root):
        self.effitrain, self.tiny_model, self.rows, self.root = effitrain, tiny_model, rows, root
        self.small, self.full, self.target = root / "small", root / "full", root / "target"
        shutil.copytree(small, self.small)
        shutil.copytree(full, self.full)
        self.adapter_of(self.small)

    def adapter_of(self, model):
        """Train one step on ``model``; its run folder is the adapter to recover."""
        self.adapter = self.root / f"run-{model.name}"
        command = ["run", "--model", model, "--dataset", self.rows, "--max-steps", 1, "--max-seq-len", 64]
        assert self.effitrain(*command, "-o", self.adapter).code == 0

    def use_base(self, *shape, **sizes):
        self.full = self.tiny_model(*shape, **sizes)

    def change_base(self):
        tensors = load_file(self.full / "model.safetensors")
        tensors["model.norm.weight"] += 1
        save_file(tensors, self.full / "model.safetensors")


@pytest.mark.parametrize("name", RECOVERIES)
def test_recoveries(effitrain, tiny_model, full, small, rows, name, tmp_path):
    place = Place(effitrain, tiny_model, full, small, rows, tmp_path)
    spoil, words = RECOVERIES[name]
    spoil(place)
    command = ["recover", "--model", place.full, "--adapter", place.adapter, "--keep", place.small, "-o", place.target]
    refused(effitrain(*command), *words)
    assert not (place.target / "adapter_config.json").exists()
