"""A run on a card from recipe to report: it learns, keeps its budget, resumes after a kill, and its adapter answers."""

import json

import pytest
import torch

from effitrain import api
from effitrain.core.units import parse_bytes
from effitrain.planning import recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
]
BUDGET = "4G"


@pytest.fixture
def asked(tiny_model, tmp_path):
    """``asked(folder, **fields)``: the recipe of a short run on questions with one answer."""
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"What comes after {n}?", "completion": f"After {n} comes the sky."} for n in range(200)]
    data.write_text("\n".join(map(json.dumps, rows)))

    def make(folder, tied=False, **fields):
        settings = {
            "model": str(tiny_model("llama", tied)), "dataset": str(data), "output_dir": str(tmp_path / folder),
            "gpu_mem": BUDGET, "max_seq_len": 128, "batch_size": 4, "grad_accum": 2, "max_steps": 12,
            "lora_r": 8, "lora_dropout": 0.1, "lr": 1e-2, "save_every": 4,
        }  # fmt: skip
        return recipe(**{**settings, **fields})

    return make


class Watch(api.Events):
    """Keeps plan, notes and losses; raises when step ``stop_at`` is done, as a kill would."""

    def __init__(self, stop_at=None):
        self.stop_at, self.notes, self.losses = stop_at, [], []

    def planned(self, plan):
        self.plan = plan

    def note(self, text):
        self.notes.append(text)

    def step(self, record):
        self.losses.append(record.loss)
        if record.step == self.stop_at:
            raise RuntimeError("killed")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("recompute", ["none", "layer"])
@pytest.mark.parametrize("packing", [False, True])
def test_it_learns_within_its_budget(asked, tied, recompute, packing):
    watch = Watch()
    report = api.run(asked("out", tied, recompute=recompute, packing=packing), watch)
    assert report.loss.eval_after < 0.7 * report.loss.eval_before
    assert watch.plan.settings.dtype == ("bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16")
    memory = report.memory
    assert 2**20 < memory.measured_peak_bytes <= memory.budget_bytes <= parse_bytes(BUDGET)


def test_a_killed_run_goes_on(asked, tmp_path):
    """Backward kernels may add in any order, so losses agree to rounding and not to the bit."""
    whole = Watch()
    api.run(asked("whole", dtype="fp32"), whole)
    with pytest.raises(RuntimeError, match="killed"):
        api.run(asked("cut", dtype="fp32"), Watch(stop_at=6))
    again = Watch()
    api.run(asked("cut", dtype="fp32"), again)
    assert any("step-4, after step 4 of 12" in note for note in again.notes)
    assert again.losses == pytest.approx(whole.losses[4:], rel=1e-3)
    lines = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 13))
    assert all(0 < json.loads(line)["device_peak_bytes"] <= parse_bytes(BUDGET) for line in lines)


def test_the_adapter_evaluates_and_answers(asked, tmp_path):
    done = asked("out", dtype="fp32")
    report = api.run(done)
    data = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    with_adapter, without = (api.evaluate(done, adapter)["loss"] for adapter in (str(tmp_path / "out"), None))
    assert with_adapter < 0.7 * without
    assert with_adapter == pytest.approx(report.loss.eval_after, rel=0.3)
    question = [{"role": "user", "content": data[0]["prompt"]}]
    assert isinstance("".join(api.chat(done, str(tmp_path / "out")).answer(question, 8)), str)


def test_a_streamed_run_says_how_often_memory_was_asked_for(asked):
    report = api.run(asked("streamed", fit="stream", resident_layers=0))
    assert report.stream["copies"] == report.stream["copies_planned"]
    assert isinstance(report.stream["allocations_in_steady_state"], int)
