"""The step benchmark: every contender computes the same loss from the same weights and tokens."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from effitrain.cli.bench import command
from effitrain.core.budget import MemoryBudget
from effitrain.core.errors import BudgetError
from effitrain.core.plan import make_plan
from effitrain.core.recipe import make_recipe
from effitrain.evals import bench_step
from effitrain.evals.bench_step import CONTENDERS, Work, measure
from effitrain.model.load import find_base

ROOMY = MemoryBudget(2**40, 2**40, 0, "cpu")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of peft and torch.utils.checkpoint
def test_all_lose_alike(tiny_model):
    base = find_base(str(tiny_model("llama", ffn=128)), "synthetic")
    work = Work(base, 2, 24, 4, 1, torch.device("cpu"), torch.float32)
    ours, without, stock = (measure(contender, work) for contender in CONTENDERS[:3])
    assert ours["losses"] == without["losses"] and len(ours["losses"]) == 1 + bench_step.WARM_UP
    assert stock["losses"][0] == pytest.approx(ours["losses"][0], rel=1e-4)
    for result in (ours, stock):
        assert result["tokens_per_second"] > 0 and result["losses"][-1] < result["losses"][0]
    fixed = {"recompute": "layer", "max_seq_len": 24, "batch_size": 2, "grad_accum": 1, "lora_r": 4, "fit": "resident"}
    recipe = make_recipe({**fixed, "mlp_tiles": 1, "offload_activations": "off"})
    assert ours["peak_bytes"] == pytest.approx(make_plan(base.spec, recipe, ROOMY).peak_bytes, rel=0.1)
    assert ours["peak_bytes"] < stock["peak_bytes"] < 2 * ours["peak_bytes"]


def test_one_line_a_contender(monkeypatch):
    results = [
        {"contender": "a", "tokens_per_second": 1.0, "peak_bytes": 2**30, "losses": [2.5], "same_loss": True},
        {"contender": "c", "tokens_per_second": 1.0, "peak_bytes": 2**30, "losses": [2.7], "same_loss": False},
        {"contender": "b", "failed": "out of memory"},
    ]
    asked = []
    monkeypatch.setattr(bench_step, "in_processes", lambda *args: asked.append(args) or iter(results))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    answer = CliRunner().invoke(command, ["step"])
    shown = answer.stdout
    assert asked[0][:3] == ("tiny", (4, 512, 16, 8), "cpu fp32") and "built-in tiny model" in answer.stderr
    assert (
        "1.0 GiB" in shown
        and "first loss 2.5000\n" in shown
        and "2.7000, NOT THE SAME" in shown
        and "b: failed. out of memory" in shown
    )
    answer = CliRunner().invoke(command, ["step", "--json"])
    told = json.loads(answer.stdout)
    assert not answer.stderr
    assert told["contenders"] == results and told["torch"] == torch.__version__


def test_each_in_a_process_of_its_own(monkeypatch):
    """Losses are compared with the first contender's; one that is not installed is left out, one that fails says so."""
    losses = dict(zip(CONTENDERS, (2.0, 2.001, 2.1), strict=False))

    def run(command, env, capture_output, text):
        contender = command[4]
        assert told[-1].startswith(f"Timing {contender}, ") and command[-1] == str(os.getpid())
        assert (env.get("EFFITRAIN_KERNELS_OFF") == "all") == ("without" in contender)
        if contender == CONTENDERS[3]:
            return SimpleNamespace(returncode=1, stdout="", stderr="out of memory")
        result = {"contender": contender, "losses": [losses[contender], 1.0]}
        return SimpleNamespace(returncode=0, stdout=f"noise\n{json.dumps(result)}\n", stderr="")

    monkeypatch.setattr(bench_step.subprocess, "run", run)
    monkeypatch.setattr(bench_step.peers, "installed", lambda name: True)
    told: list[str] = []
    results = list(bench_step.in_processes("tiny", (2, 24, 4, 1), "cpu fp32", told.append))
    assert told[-1] == "Timing Unsloth, 4 of 4"
    assert [r.get("same_loss") for r in results] == [True, True, False, None]
    assert results[3] == {"contender": "Unsloth", "failed": "out of memory"}
    monkeypatch.setattr(bench_step.peers, "installed", lambda name: False)
    assert len(list(bench_step.in_processes("tiny", (2, 24, 4, 1), "cpu fp32", told.append))) == 3


def test_a_shape_too_large_for_this_machine_is_refused(monkeypatch):
    """Nobody waits for hours, or for the system to run out of memory."""
    monkeypatch.setattr("effitrain.io.machine.card", lambda: None)
    monkeypatch.setattr("effitrain.io.machine.free_host_bytes", lambda: 16 * 2**30)
    bench_step.check_memory("tiny", (4, 512, 16, 8))
    taken = r"4 x 2048 tokens with llama-70b takes more .* needs \d+\.\d GiB at 8192 tokens and the budget is 12\.8 GiB"
    with pytest.raises(BudgetError, match=taken):
        bench_step.check_memory("llama-70b", (4, 2048, 16, 8))
    monkeypatch.setattr("effitrain.io.machine.free_host_bytes", lambda: 2**30)
    with pytest.raises(BudgetError, match=r"The host needs .* and its budget is 819 MiB: \d+ MiB short\."):
        bench_step.check_memory("tiny", (4, 512, 16, 8))


def test_no_length_is_offered_that_the_plan_refuses():
    shortest = next(option for option in command.commands["step"].params if option.name == "length").type.min
    bench_step.check_memory("tiny", (1, shortest, 1, 1))


CHILD = "import sys, time; from effitrain.evals.bench_step import end_with; end_with(int(sys.argv[1]))"
CHILD += "; print('up', flush=True); time.sleep(60)"
PARENT = "import os, subprocess, sys; subprocess.run([sys.executable, '-P', '-c', sys.argv[1], str({})])"


@pytest.mark.parametrize("parent", ["os.getpid()", "1"], ids=["killed later", "gone before"])
def test_a_contender_ends_with_the_command(parent):
    """However the command ends: here it is killed, and can clean up nothing."""
    command = [sys.executable, "-P", "-c", PARENT.format(parent), CHILD]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as starter:
        assert starter.stdout
        assert (starter.stdout.readline() == b"up\n") == (parent != "1")
        starter.kill()
        starter.communicate(timeout=10)  # ends when nobody holds the pipe any more, the child neither


@pytest.mark.slow
def test_in_processes_of_their_own(tiny_model):
    results = list(bench_step.in_processes(str(tiny_model("llama", ffn=128)), (2, 24, 4, 1), "cpu fp32"))
    assert (
        [r["contender"] for r in results] == list(CONTENDERS[:3])
        and all(r["same_loss"] for r in results)
        and all(r["tokens_per_second"] > 0 for r in results)
    )
