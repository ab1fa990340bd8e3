"""Each trial of a training step fails when the mistake it looks for is made; ``test_trials`` sees that they pass."""

import pytest
import torch

from effitrain.evals import step_trials
from effitrain.model import attention
from effitrain.model.decoder import Decoder
from effitrain.stream.fresh import FreshLayers


def test_a_slot_that_holds_something_else(monkeypatch):
    read_into = FreshLayers.read_into

    def damaged(self, layer, target):
        read_into(self, layer, target)
        target[:8] ^= layer == 1

    monkeypatch.setattr(FreshLayers, "read_into", damaged)
    ok, detail = step_trials.streamed_gradients()
    assert ok is False and " of 43 equal" in detail


def test_an_evaluation_that_leaves_a_trace(monkeypatch):
    def repacking(self):
        self.layers[0].input_layernorm.weight *= 2
        return self.train(False)

    monkeypatch.setattr(step_trials, "fresh", lambda *args: _fresh(*args).train(False))
    monkeypatch.setattr(Decoder, "eval", repacking)
    assert step_trials.training_after_evaluation()[0] is False


def test_a_mean_of_each_micro_batch(monkeypatch):
    right = step_trials.accumulate

    def by_micro_batch(decoder, micro, clock, parameters):
        losses = [right(decoder, [batch], clock, ()) for batch in micro]
        for parameter in parameters:
            parameter.grad /= sum(batch.trained_tokens for batch in micro[-1:]) * len(micro)
        return sum(losses) / len(losses)

    monkeypatch.setattr(step_trials, "accumulate", by_micro_batch)
    assert step_trials.accumulated_gradients()[0] is False


_fresh = step_trials.fresh


@pytest.mark.parametrize("part", ["lm_head", "model.embed_tokens"])
def test_weights_that_were_upcast(monkeypatch, part):
    def upcast(*args):
        decoder = _fresh(*args)
        module = decoder.get_submodule(part)
        module.weight = module.weight.float()
        return decoder

    monkeypatch.setattr(step_trials, "fresh", upcast)
    ok, detail = step_trials.precision_of_frozen_weights()
    assert ok is False and "(211, 64)" in detail


@pytest.mark.parametrize("fault", ["sees the next token", "sees nothing"])
def test_attention_that_looks_ahead(monkeypatch, fault):
    right = attention.shifted_attention

    def wrong(query, key, value, *rest):
        if fault == "sees nothing":
            return torch.zeros_like(query.transpose(1, 2))
        return right(query, key.roll(-1, 2), value.roll(-1, 2), *rest)

    monkeypatch.setattr(attention, "shifted_attention", wrong)
    if fault == "sees nothing":
        monkeypatch.setattr(Decoder, "forward", lambda self, ids, positions, segments: torch.zeros(len(ids), 64))
    assert step_trials.shifted_attention()[0] is False


def test_a_merge_into_nf4(monkeypatch):
    load = step_trials.load_file
    monkeypatch.setattr(
        step_trials, "load_file", lambda file: {k: _through_nf4(t) for k, t in load(file).items() if t.dim() > 1}
    )
    ok, detail = step_trials.merged_update()
    assert ok is False and "off by 9." in detail


def _through_nf4(tensor):
    return step_trials._through_nf4(tensor.float())
