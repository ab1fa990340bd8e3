"""Samples before and after training: which are chosen, that they are the model's answers, and what they leave alone."""

import json
from importlib.resources import files

import numpy as np
import pytest
from killed import Killed, KilledAfter

from effitrain import api
from effitrain.data.tokenized import IGNORE, TokenSet
from effitrain.evals import samples as room
from effitrain.evals.samples import ANSWER, COUNT, PROMPT, choose
from effitrain.planning import recipe


def tokens(*rows: tuple[int, int]) -> TokenSet:
    """Samples of so many untrained tokens, then so many trained ones, then an untrained end."""
    ids, labels = [], []
    for untrained, trained in rows:
        mine = list(range(100, 101 + untrained + trained))
        ids += mine
        labels += [IGNORE] * untrained + mine[untrained:-1] + [IGNORE]
    ends = np.cumsum([0, *(a + b + 1 for a, b in rows)])
    return TokenSet(np.array(ids, np.int32), np.array(labels, np.int32), ends)


def test_the_first_that_are_short_enough():
    found = choose(tokens((5, 3), (PROMPT + 1, 3), (4, 2 * ANSWER), (3, 1), (2, 2)))
    assert [(len(one.prompt), len(one.wanted)) for one in found] == [(5, 3), (4, ANSWER), (3, 1)]
    assert found[0].prompt == [100, 101, 102, 103, 104] and found[0].wanted == [105, 106, 107]
    assert len(found) == COUNT


def test_running_text_is_asked_for_its_second_half():
    (one,) = choose(tokens((1, 20)))
    assert len(one.prompt) == 11 and len(one.wanted) == 11
    (long,) = choose(tokens((1, 900)))
    assert (len(long.prompt), len(long.wanted)) == (PROMPT, ANSWER)


def test_an_empty_set_has_none():
    assert choose(TokenSet(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(1, np.int64))) == ()


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> dict:
    """A short run of the built-in model on a few of its rows."""
    rows = (files("effitrain") / "presets/tiny_data/train.jsonl").read_text(encoding="utf-8").splitlines()[:30]
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("\n".join(rows), encoding="utf-8")
    return {
        "model": "tiny", "dataset": str(path), "eval_fraction": 0.2, "max_steps": 3, "batch_size": 4, "grad_accum": 1,
        "save_every": 1, "gpu_mem": 2**34, "host_mem": 2**34,
    }  # fmt: skip


@pytest.fixture
def run(asked, tmp_path, monkeypatch):
    """``run(name, events, **fields)``: its report, and its adapter's bytes."""
    monkeypatch.setattr("effitrain.report.files.loss_png", lambda *drawn: b"")

    def call(name, events=None, **fields):
        report = api.run(recipe(**{**asked, **fields}, output_dir=str(tmp_path / name)), events)
        return report, (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()

    return call


def test_they_are_what_the_model_answers(run, tmp_path):
    report, _ = run("out")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    bare, trained = (api.chat(recipe(model="tiny"), adapter) for adapter in (None, str(tmp_path / "out")))
    for sample in report.samples:
        question = sample["prompt"].split("<|user|>")[1].split("<|end|>")[0].strip()
        for session, when in ((bare, "before"), (trained, "after")):
            said = "".join(session.answer([{"role": "user", "content": question}], ANSWER))
            assert said.startswith(sample[when]) and sample[when]
        assert sample["wanted"] and sample["wanted"] in page
    assert any(sample["before"] != sample["after"] for sample in report.samples)


def test_they_change_no_weight_and_outlast_a_kill(run, monkeypatch):
    whole, weights = run("whole")
    with pytest.raises(Killed):
        run("killed", KilledAfter(2))
    again, again_weights = run("killed")
    assert again.samples == whole.samples and again_weights == weights
    monkeypatch.setattr("effitrain.training.choose", lambda tokens: ())
    without, same = run("without")
    assert without.samples is None and same == weights


def test_they_take_no_more_memory_than_training(run, monkeypatch):
    """Not where they would, and not where each token would fetch all layers once more."""
    report, _ = run("out")
    assert report.memory.measured_peak_bytes <= 1.05 * report.memory.predicted_peak_bytes
    assert run("streamed", fit="stream", resident_layers=0)[0].samples is None
    monkeypatch.setattr(room, "generation_bytes", lambda *facts: 2**40)
    assert run("no-room")[0].samples is None


@pytest.mark.parametrize("method", ["full", "lisa", "lisa-delta", "lisa-lora"])
def test_whatever_is_trained(asked, tmp_path, monkeypatch, method):
    monkeypatch.setattr("effitrain.report.files.loss_png", lambda *drawn: b"")
    report = api.run(recipe(**asked, method=method, quant="none", output_dir=str(tmp_path / "out")))
    assert len(report.samples) == COUNT
    assert json.loads((tmp_path / "out" / "report.json").read_text())["samples"] == list(report.samples)
