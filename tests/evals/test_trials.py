"""Each trial of the doctor passes here, and fails when what it looks at is broken."""

import dataclasses

import pytest
import torch

from effitrain.evals import trials
from effitrain.io.hub import find_model
from effitrain.model.decoder import Decoder


@pytest.fixture
def builtin(tiny_model, monkeypatch):
    """A tokenizer of bytes in the place of the built-in one."""
    monkeypatch.setattr(trials, "find_model", lambda name: find_model(str(tiny_model("llama"))))


@pytest.mark.parametrize("name", trials.TRIALS)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft calls what transformers has deprecated
def test_trials_pass(builtin, name):
    ok, detail = trials.TRIALS[name]()
    assert ok is True, detail


def test_samples_that_see_each_other(monkeypatch):
    forward = Decoder.forward
    monkeypatch.setattr(Decoder, "forward", lambda self, ids, positions, segments: forward(self, ids, positions))
    ok, detail = trials.packing_isolation()
    assert ok is False and "sample 1 of 4" in detail


def test_isolation_is_not_a_model_that_sees_nothing(monkeypatch):
    monkeypatch.setattr(Decoder, "forward", lambda self, ids, positions, segments: torch.zeros(len(ids), 64))
    assert trials.packing_isolation()[0] is False


@pytest.mark.parametrize(
    "damage",
    [
        lambda sample: sample.trained | True,  # the prompt is trained as well
        lambda sample: sample.trained & (sample.ids != 2),  # the end of sequence is left out
        lambda sample: sample.trained & (sample.ids == 2),  # and the answer itself
    ],
)
def test_wrong_masks(builtin, monkeypatch, damage):
    encode = trials.encode

    def damaged(tokenizer, rendered):
        return [dataclasses.replace(sample, trained=damage(sample)) for sample in encode(tokenizer, rendered)]

    monkeypatch.setattr(trials, "encode", damaged)
    ok, detail = trials.end_of_turn()
    assert ok is False and "template auto trains on" in detail


def test_an_adapter_that_is_not_loaded(monkeypatch):
    monkeypatch.setattr(trials, "load_into", lambda adapters, bundle, source: None)
    assert trials.saved_adapter()[0] is False


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_adapter_that_peft_reads_otherwise(monkeypatch):
    save = trials.save_adapter

    def distorted(folder, factors, config, base):
        save(folder, {path: (1.001 * left, right) for path, (left, right) in factors.items()}, config, base)

    monkeypatch.setattr(trials, "save_adapter", distorted)
    ok, detail = trials.stock_peft()
    assert ok is False and "logits differ by" in detail


def test_without_peft(monkeypatch):
    monkeypatch.setattr(trials, "find_spec", lambda name: None)
    assert trials.stock_peft() == (None, "peft is not installed, optional")


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_a_loss_that_is_wrong(monkeypatch, factor):
    right = trials.linear_cross_entropy
    monkeypatch.setattr(trials, "linear_cross_entropy", lambda *args, **kwargs: factor * right(*args, **kwargs))
    assert trials.fused_loss()[0] is False
