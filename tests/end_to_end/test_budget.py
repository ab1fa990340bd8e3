"""A budget is a promise: what the trial step disproves is planned anew, or stops before training."""

import json
import weakref
from dataclasses import replace

import pytest

from effitrain import api
from effitrain.core.budget import CUDA_SLACK_BYTES
from effitrain.core.errors import BudgetError
from effitrain.core.plan import make_plan
from effitrain.train import job as job_room
from effitrain.train import memory
from effitrain.train.memory import measured

MIB = 2**20


@pytest.fixture
def asked(tiny_model, tmp_path):
    """A recipe on a tiny model whose step takes some MiB."""
    rows = [{"text": "the cat sat on the mat " * 12} for _ in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    fields = {"max_seq_len": 128, "batch_size": 4, "grad_accum": 1, "max_steps": 2, "quant": "none", "fit": "resident"}
    return api.recipe(
        model=str(tiny_model()), dataset=str(tmp_path / "rows.jsonl"), output_dir=str(tmp_path / "out"), **fields
    )


class Told(api.Events):
    """Keeps plans and notes."""

    def __init__(self):
        self.plans, self.notes = [], []

    def planned(self, plan):
        """Keep it."""
        self.plans.append(plan)

    def note(self, text):
        """Keep it."""
        self.notes.append(text)


def lying(times: int):
    """A planner that claims of its first ``times`` plans that they fit, whatever they take."""
    calls = []

    def plan(spec, recipe, budget):
        calls.append(1)
        if len(calls) > times:
            return make_plan(spec, recipe, budget)
        honest = make_plan(spec, recipe, replace(budget, gpu_bytes=2**40))
        return replace(honest, budget_bytes=budget.gpu_bytes)

    return plan


def between(asked):
    """A budget that only leaner settings keep than those of a free choice."""
    spec, found = api.find_base(asked.model).spec, api.find_budget(asked)
    free, least = (make_plan(spec, asked, budget).peak_bytes for budget in (found, replace(found, gpu_bytes=1)))
    return (free + least) // 2


def test_what_the_trial_disproves_is_planned_anew(asked, monkeypatch):
    budget = between(asked)
    monkeypatch.setattr(api, "make_plan", lying(1))
    told = Told()
    report = api.run(asked.changed(gpu_mem=budget), told)
    first, second = told.plans
    assert first.settings.recompute == "none" and second.settings.recompute != "none"
    assert any("Planning anew" in note for note in told.notes)
    assert report.memory.measured_peak_bytes <= budget == report.memory.budget_bytes


def test_the_first_model_is_gone_before_the_second_is_loaded(asked, monkeypatch):
    """A card has no room for both."""
    decoders, still_there = [], []

    def assemble(*args, **kwargs):
        still_there.append([decoder for decoder in decoders if decoder() is not None])
        job = job_room.assemble(*args, **kwargs)
        decoders.append(weakref.ref(job.decoder))
        return job

    monkeypatch.setattr("effitrain.training.assemble", assemble)
    monkeypatch.setattr(api, "make_plan", lying(1))
    api.run(asked.changed(gpu_mem=between(asked)))
    assert still_there == [[], []]


def test_a_budget_that_nothing_keeps_never_starts_training(asked, monkeypatch, tmp_path):
    monkeypatch.setattr(api, "make_plan", lying(99))
    with pytest.raises(BudgetError, match=r"A step took .* and the budget is") as caught:
        api.run(asked.changed(gpu_mem=MIB // 4))
    assert caught.value.exit_code == 3 and "--recompute layer" in caught.value.next_step
    assert not (tmp_path / "out" / "metrics.jsonl").exists() and not (tmp_path / "out" / "checkpoints").exists()


def test_the_report_predicts_the_batch_that_the_data_have(asked):
    report = api.run(asked)
    error = report.memory.predicted_peak_bytes / report.memory.measured_peak_bytes - 1
    assert abs(error) < 0.05


def test_rows_that_are_masked_count_for_no_logits(asked, tmp_path):
    """All rows counted, the prediction is 5 % high here, and the more so the larger the vocabulary."""
    rows = [{"prompt": "Gus was at the mill. " * 20, "completion": "b"} for _ in range(12)]
    (tmp_path / "masked.jsonl").write_text("\n".join(map(json.dumps, rows)))
    fields = {"model": "tiny", "quant": "nf4", "recompute": "none", "max_seq_len": 256}
    memory = api.run(asked.changed(dataset=str(tmp_path / "masked.jsonl"), **fields)).memory
    assert abs(memory.predicted_peak_bytes / memory.measured_peak_bytes - 1) < 0.02


def test_evaluations_of_a_run_that_never_took_a_step_are_forgotten(asked, tmp_path):
    """Its folder may go to another recipe, whose loss before training is its own."""
    rows = asked.changed(eval_fraction=0.3)

    class Stops(api.Events):
        def training(self, done, steps):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.run(rows.changed(weights="synthetic:1"), Stops())
    assert json.loads((tmp_path / "out" / "run.json").read_text())["evals"]
    alone = api.run(rows.changed(output_dir=str(tmp_path / "alone")))
    assert api.run(rows).loss.eval_before == alone.loss.eval_before


def test_the_context_is_measured_where_a_card_is(asked, monkeypatch):
    card = replace(api.find_budget(asked), device="cuda", overhead_bytes=12 * 2**30 // 10)
    assert measured(card) == card
    monkeypatch.setattr(memory.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(memory, "cuda_context_bytes", lambda: 300 * MIB)
    assert measured(card).overhead_bytes == 300 * MIB + CUDA_SLACK_BYTES
    assert measured(api.find_budget(asked)).overhead_bytes == 0


def test_offloaded_inputs_of_short_samples_take_what_is_predicted(tmp_path):
    """Their buffers are for the longest micro-batch there is, not for the longest there could be."""
    recipe = api.recipe(fit="stream", max_steps=1, eval_fraction=0.0, output_dir=str(tmp_path / "out"))
    memory = api.run(recipe).memory
    assert abs(memory.predicted_peak_bytes / memory.measured_peak_bytes - 1) < 0.05
