"""The step benchmark: every contender computes the same loss from the same weights and tokens."""

import json

import pytest
import torch
from click.testing import CliRunner

from effitrain.cli.bench import command
from effitrain.evals import bench_step
from effitrain.evals.bench_step import CONTENDERS, Work, measure
from effitrain.model.load import find_base


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of peft and torch.utils.checkpoint
def test_all_lose_alike(tiny_model):
    base = find_base(str(tiny_model("llama", ffn=128)), "synthetic")
    work = Work(base, 2, 24, 4, 1, torch.device("cpu"), torch.float32)
    ours, without, stock = (measure(contender, work) for contender in CONTENDERS)
    assert ours["losses"] == without["losses"] and len(ours["losses"]) == 1 + bench_step.WARM_UP
    assert stock["losses"][0] == pytest.approx(ours["losses"][0], rel=1e-4)
    for result in (ours, stock):
        assert result["tokens_per_second"] > 0 and result["losses"][-1] < result["losses"][0]


def test_one_line_a_contender(monkeypatch):
    results = [
        {"contender": "a", "tokens_per_second": 1.0, "peak_bytes": 2**30, "losses": [2.5]},
        {"contender": "b", "failed": "out of memory"},
    ]
    monkeypatch.setattr(bench_step, "in_processes", lambda *args: iter(results))
    shown = CliRunner().invoke(command, ["step"]).output
    assert "1.0 GiB" in shown and "first loss 2.5000" in shown and "b: failed. out of memory" in shown
    assert json.loads(CliRunner().invoke(command, ["step", "--json"]).output) == results


@pytest.mark.slow
def test_in_processes_of_their_own(tiny_model):
    results = list(bench_step.in_processes(str(tiny_model("llama", ffn=128)), (2, 24, 4, 1), "cpu fp32"))
    assert [r["contender"] for r in results] == list(CONTENDERS) and all(r["tokens_per_second"] > 0 for r in results)
