"""A run that is killed or stopped goes on with the same command, and ends in the same bytes as one left alone.

Every run is a process of its own, forked from a server that has imported the libraries already: a start takes half a
second instead of ten.
"""

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from effitrain.cli.main import main

STEPS = 20
# Dropout, accumulation, packing and evaluations on the way: whatever depends on where the run stands.
RECIPE = f"--max-steps {STEPS} --batch-size 2 --grad-accum 2 --packing --max-seq-len 96 --eval-every 4 --lr 5e-3"
ADAPTER = "--lora-r 4 --lora-dropout 0.1 --weight-decay 0.01 --quant none --dtype fp32"
PRELOADED = [
    *("effitrain.api", "effitrain.cli.run", "effitrain.cli.console"),
    *("transformers.models.llama.modeling_llama", "matplotlib.figure", "matplotlib.backends.backend_agg"),
]


@dataclass(frozen=True)
class Job:
    """One command, and the folder it writes."""

    arguments: Sequence[str]
    folder: Path

    def start(self) -> BaseProcess:
        """The command in a new process."""
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(PRELOADED)
        process = server.Process(target=main, args=([*self.arguments, "-o", str(self.folder)],))
        process.start()
        return process

    def finish(self) -> None:
        """Run to the end."""
        process = self.start()
        process.join(120)
        assert process.exitcode == 0

    def lines(self) -> int:
        """Whole lines of metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def started(self, lines: int) -> BaseProcess:
        """A process that has trained until ``lines`` steps are written, or is about to."""
        process = self.start()
        deadline = time.monotonic() + 60
        while process.is_alive() and self.lines() < lines:
            assert time.monotonic() < deadline, "the run does not come forward"
            time.sleep(0.002)
        return process

    def result(self) -> tuple[bytes, list[tuple[int, float]], list[list[float]]]:
        """What must not depend on interruptions: the adapter, step and loss of every step, the evaluations."""
        metrics = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        adapter = (self.folder / "adapter" / "adapter_model.safetensors").read_bytes()
        evals = json.loads((self.folder / "run.json").read_text())["evals"]
        return adapter, [(line["step"], line["loss"]) for line in metrics], evals


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Callable[..., Path], counting: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A finished run that nothing interrupted."""
    flags = [*RECIPE.split(), *ADAPTER.split()]
    job = Job(
        ["run", "--quiet", "--model", str(tiny_model()), "--dataset", str(counting), *flags],
        tmp_path_factory.mktemp("undisturbed") / "out",
    )
    job.finish()
    assert [step for step, _ in job.result()[1]] == list(range(1, STEPS + 1))
    return job


def whole(job: Job) -> list[str]:
    """The checkpoints that are there; fails on one that is not whole, or on a half result."""
    from effitrain.io.manifest import verify_manifest

    folders = sorted((job.folder / "checkpoints").glob("[!.]*"))
    for folder in folders:
        verify_manifest(folder)
    assert not (job.folder / "report.json").exists()
    return [folder.name for folder in folders]


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
def test_kill_9_at_any_moment_costs_nothing(undisturbed: Job, tmp_path: Path, kills: int) -> None:
    """Kills fall between the first import and the last step, most of them into the writing of a checkpoint."""
    job = replace(undisturbed, arguments=[*undisturbed.arguments, "--save-every", "1"], folder=tmp_path / "out")
    rng = random.Random(kills)
    killed = 0
    for lines in sorted(rng.randrange(STEPS - 5) for _ in range(kills)):
        process = job.started(lines)
        time.sleep(rng.random() * 0.15)
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        whole(job)
    assert killed == kills
    job.finish()
    assert job.result() == undisturbed.result()
    left = [path.name for path in [*job.folder.iterdir(), *(job.folder / "checkpoints").iterdir()]]
    assert not [name for name in left if name.startswith(".")]
    assert {"step-19", "step-20"} <= set(left)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(undisturbed: Job, tmp_path: Path, number: signal.Signals) -> None:
    job = replace(undisturbed, arguments=[*undisturbed.arguments, "--save-every", "1000"], folder=tmp_path / "out")
    process = job.started(3)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 130
    assert whole(job) == [f"step-{job.lines()}"]
    job.finish()
    assert job.result() == undisturbed.result()
