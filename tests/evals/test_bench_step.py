"""The step benchmark: every contender computes the same loss from the same weights and tokens."""

import json
from types import SimpleNamespace

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
    ours, without, stock = (measure(contender, work) for contender in CONTENDERS[:3])
    assert ours["losses"] == without["losses"] and len(ours["losses"]) == 1 + bench_step.WARM_UP
    assert stock["losses"][0] == pytest.approx(ours["losses"][0], rel=1e-4)
    for result in (ours, stock):
        assert result["tokens_per_second"] > 0 and result["losses"][-1] < result["losses"][0]


def test_one_line_a_contender(monkeypatch):
    results = [
        {"contender": "a", "tokens_per_second": 1.0, "peak_bytes": 2**30, "losses": [2.5], "same_loss": True},
        {"contender": "c", "tokens_per_second": 1.0, "peak_bytes": 2**30, "losses": [2.7], "same_loss": False},
        {"contender": "b", "failed": "out of memory"},
    ]
    monkeypatch.setattr(bench_step, "in_processes", lambda *args: iter(results))
    shown = CliRunner().invoke(command, ["step"]).output
    assert (
        "1.0 GiB" in shown
        and "first loss 2.5000\n" in shown
        and "2.7000, NOT THE SAME" in shown
        and "b: failed. out of memory" in shown
    )
    told = json.loads(CliRunner().invoke(command, ["step", "--json"]).output)
    assert told["contenders"] == results and told["torch"] == torch.__version__


def test_each_in_a_process_of_its_own(monkeypatch):
    """Losses are compared with the first contender's; one that is not installed is left out, one that fails says so."""
    losses = dict(zip(CONTENDERS, (2.0, 2.001, 2.1), strict=False))

    def run(command, env, capture_output, text):
        contender = command[4]
        assert (env.get("EFFITRAIN_KERNELS_OFF") == "all") == ("without" in contender)
        if contender == CONTENDERS[3]:
            return SimpleNamespace(returncode=1, stdout="", stderr="out of memory")
        result = {"contender": contender, "losses": [losses[contender], 1.0]}
        return SimpleNamespace(returncode=0, stdout=f"noise\n{json.dumps(result)}\n", stderr="")

    monkeypatch.setattr(bench_step.subprocess, "run", run)
    monkeypatch.setattr(bench_step.peers, "installed", lambda name: True)
    results = list(bench_step.in_processes("tiny", (2, 24, 4, 1), "cpu fp32"))
    assert [r.get("same_loss") for r in results] == [True, True, False, None]
    assert results[3] == {"contender": "Unsloth", "failed": "out of memory"}
    monkeypatch.setattr(bench_step.peers, "installed", lambda name: False)
    assert len(list(bench_step.in_processes("tiny", (2, 24, 4, 1), "cpu fp32"))) == 3


@pytest.mark.slow
def test_in_processes_of_their_own(tiny_model):
    results = list(bench_step.in_processes(str(tiny_model("llama", ffn=128)), (2, 24, 4, 1), "cpu fp32"))
    assert (
        [r["contender"] for r in results] == list(CONTENDERS[:3])
        and all(r["same_loss"] for r in results)
        and all(r["tokens_per_second"] > 0 for r in results)
    )
