"""A budget is a promise: what the trial step disproves is planned anew, or stops before training."""

import json
import weakref
from dataclasses import replace

import pytest

from effitrain import api, carry_out
from effitrain.core.errors import BudgetError
from effitrain.core.plan import make_plan
from effitrain.train.job import assemble

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


def test_what_the_trial_disproves_is_planned_anew(asked, monkeypatch):
    free = make_plan(api.find_base(asked.model).spec, asked, api.find_budget(asked))
    least = make_plan(api.find_base(asked.model).spec, asked, replace(api.find_budget(asked), gpu_bytes=1)).peak_bytes
    budget = (free.peak_bytes + least) // 2
    monkeypatch.setattr(api, "make_plan", lying(1))
    told, models = Told(), []

    def assembled(*args, **kwargs):
        assert not [model for model in models if model() is not None], "the first model is still there"
        job = assemble(*args, **kwargs)
        models.append(weakref.ref(job.decoder))
        return job

    monkeypatch.setattr(carry_out, "assemble", assembled)
    report = api.run(asked.changed(gpu_mem=budget), told)
    assert len(models) == 2
    first, second = told.plans
    assert first.settings.recompute == "none" and second.settings.recompute != "none"
    assert any("Planning anew" in note for note in told.notes)
    assert report.memory.measured_peak_bytes <= budget == report.memory.budget_bytes


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
