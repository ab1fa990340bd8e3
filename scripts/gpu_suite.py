"""What scripts/gpu_suite.sh runs on a card: the tests marked gpu, then NF4 LoRA runs of 1B, 8B and 70B shapes.

    python scripts/gpu_suite.py --seconds 520 --out benchmarks/gpu_suite.json

Weights are synthetic, data are random words; a step has one micro-batch, of 8,192 tokens where no other number is
given. Speed is the median over the steps after the first few. Each run is a process of its own, so that its peak is its
own. A clock runs from the start: what no longer fits is left out, and the results say so.

Runs under a cap compare the measured peak with the predicted one and with the budget. scripts/gpu_compare.py sets the
streamed 8B against the resident one: bits of loss and gradients, and times of steps. ``effitrain bench`` times kernels
and a step against other libraries.
"""

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "transformers", "triton", "bitsandbytes", "safetensors", "numpy")
TOKENS = 8192  # of a micro-batch
STEPS, WARM_UP = 10, 3
TEST_SECONDS = 240  # at most, of the whole
# Seconds a run takes until the first of its model has shown it: start, weights, and 11 steps on a card of 150 TFLOP/s.
GUESS = {"llama-3.2-1b": 45, "llama-3.1-8b": 75, "llama-70b": 150}
SLACK = 1.3
BENCH_SECONDS = 70  # of the kernels of an 8B layer, with what torch.compile takes for three of them
STEP_SECONDS = 110  # of a step of the 8B by us with and without kernels, by transformers and peft, and by Unsloth
COMPARE_SECONDS = 100  # of streamed against resident: two models, 700,000 tokens


@dataclass(frozen=True)
class Setting:
    """One run. ``packed``: samples of many lengths share rows of ``max_seq_len``; otherwise every row is one sample.
    ``kernels``: with ours; otherwise torch, cuBLAS and bitsandbytes compute everything. ``gpu_mem``: the cap;
    ``fit`` as in a recipe.
    """

    model: str
    max_seq_len: int
    recompute: str
    packed: bool = False
    kernels: bool = True
    tokens: int = TOKENS
    steps: int = STEPS
    gpu_mem: str | None = None
    fit: str = "resident"


def _capped(model: str, cap: str, fit: str = "auto", tokens: int = 2048, steps: int = STEPS) -> Setting:
    """A run that the plan makes fit under ``cap``."""
    return Setting(model, tokens, "auto", tokens=tokens, steps=steps, gpu_mem=cap, fit=fit)


# The most telling first: the clock cuts from the end. Streaming is set against resident after the first, kernels and
# the step of other libraries are timed after FIRST.
FIRST = (
    Setting("llama-3.1-8b", 2048, "layer"),
    _capped("llama-70b", "20G", "stream", 4096, steps=3),
    *(_capped("llama-3.1-8b", cap) for cap in ("8G", "12G")),
    _capped("llama-3.2-1b", "8G"),
)
THEN = (
    Setting("llama-3.1-8b", 2048, "layer", kernels=False),
    Setting("llama-3.2-1b", 2048, "layer"),
    Setting("llama-3.2-1b", 2048, "none"),
    Setting("llama-3.2-1b", 2048, "none", kernels=False),
    _capped("llama-70b", "16G", "prune", steps=3),
    *(_capped("llama-3.1-8b", cap) for cap in ("16G", "20G")),
    _capped("llama-70b", "8G", "stream", steps=3),
    Setting("llama-3.1-8b", 2048, "layer", packed=True),
    Setting("llama-3.1-8b", 2048, "none"),
    Setting("llama-3.1-8b", 512, "layer"),
    Setting("llama-3.2-1b", 512, "layer"),
    Setting("llama-3.2-1b", 512, "none"),
    *(_capped("llama-70b", cap, "stream", 4096, steps=3) for cap in ("12G", "16G")),
    *(_capped("llama-3.2-1b", cap) for cap in ("12G", "16G", "20G")),
)


def main() -> None:
    """Measure everything, or, as a child, one setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("OUT_JSON") or ROOT / "benchmarks/gpu_suite.json"
    parser.add_argument("--out", type=Path, default=Path(default), help="where the JSON goes")
    parser.add_argument("--seconds", type=float, default=520, help="for everything")
    parser.add_argument("--setting", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.setting:
        print(json.dumps(measure(Setting(**args.setting), args.work)))
        return
    problem = no_card()
    if problem is not None:
        print(problem)
        sys.exit("nothing to do" not in problem)
    sys.exit(suite(args.out, time.monotonic() + args.seconds, args.seconds))


def no_card() -> str | None:
    """Why nothing can be measured here, if so."""
    import torch

    from effitrain.io.machine import card

    if torch.cuda.is_available():
        return None
    found = card()
    if found is None:
        return "No CUDA card on this machine: the GPU suite has nothing to do."
    return f"{found.name} is here, but torch {torch.__version__} cannot use it: install a CUDA build of torch."


def suite(out: Path, deadline: float, seconds: float) -> int:
    """Tests and runs until ``deadline``; 1 when one of them failed. What is done is written as it is done."""
    result: dict[str, Any] = {"command": f"scripts/gpu_suite.sh --seconds {seconds:g}", **machine(), "runs": []}
    with tempfile.TemporaryDirectory() as work:
        result["tests"] = tests(Path(work), min(TEST_SECONDS, deadline - time.monotonic()))
        say("tests", result["tests"])
        write_words(Path(work))
        for number, setting in enumerate((*FIRST, *THEN), 1):
            run = {**asdict(setting), **attempt(setting, Path(work), deadline, result["runs"])}
            result["runs"].append(run)
            say("run", run)
            if number == 1:
                command = [str(ROOT / "scripts" / "gpu_compare.py")]
                result["streaming"] = answer(command, Path(work), COMPARE_SECONDS, deadline - time.monotonic())
                say("streaming", result["streaming"])
            if number == len(FIRST):
                command = ["-m", "effitrain", "bench", "kernels", "--json", "--shapes", "8B"]
                result["kernels"] = answer(command, Path(work), BENCH_SECONDS, deadline - time.monotonic())
                say("kernels", result["kernels"])
                command = ["-m", "effitrain", "bench", "step", "--json"]
                result["step"] = answer(command, Path(work), STEP_SECONDS, deadline - time.monotonic())
                say("step", result["step"])
            result["seconds"] = round(seconds - (deadline - time.monotonic()), 1)
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(result, indent=2) + "\n")
    ours = [row for row in result["step"].get("contenders", []) if row["contender"].startswith("effitrain")]
    parts = (result["tests"], *result["runs"], result["streaming"], result["kernels"], result["step"], *ours)
    failed = [part for part in parts if "failed" in part or part.get("equal") is False]
    print(f"{result['seconds']:.0f} s, {len(failed)} parts failed; results in {out}")
    return int(bool(failed))


def machine() -> dict[str, Any]:
    """The card and the software."""
    import torch

    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version,power.limit", "--format=csv,noheader"]
    name, memory, driver, power = subprocess.check_output(query, text=True).splitlines()[0].split(", ")
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {"card": name, "memory": memory, "driver": driver, "power_limit": power, "versions": versions}


def tests(work: Path, seconds: float) -> dict[str, Any]:
    """Run the tests marked gpu; only files that hold such a mark are read, so others need no package they lack here."""
    marked = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    # Versions here need not be the pinned ones, so a warning of theirs is no failure.
    options = ["-m", "gpu", "-q", "-W", "default", "-p", "no:cacheprovider", f"--junitxml={work / 'tests.xml'}"]
    started = time.monotonic()
    try:
        done = run([sys.executable, "-P", "-m", "pytest", *options, *marked], work, seconds)
    except subprocess.TimeoutExpired:
        return {"failed": f"the tests took more than {seconds:.0f} s"}
    took = round(time.monotonic() - started, 1)
    if not (work / "tests.xml").exists():
        return {"failed": last_lines(done), "seconds": took}
    cases = list(ElementTree.parse(work / "tests.xml").iter("testcase"))
    broken = {
        name_of(case): fault.get("message", "")[:500]
        for case in cases
        for fault in (*case.findall("failure"), *case.findall("error"))
    }
    skipped = {name_of(case): fault.get("message", "") for case in cases for fault in case.findall("skipped")}
    counts = {"passed": len(cases) - len(broken) - len(skipped), "skipped": skipped, "seconds": took}
    return {**counts, "failed": broken} if broken or done.returncode else counts


def answer(arguments: list[str], work: Path, needed: float, left: float) -> dict[str, Any]:
    """The JSON that Python with ``arguments`` prints, in the time that is left."""
    if left < needed:
        return {"skipped": f"{left:.0f} s are left and it takes about {needed} s"}
    try:
        done = run([sys.executable, "-P", *arguments], work, left)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done when the {left:.0f} s that were left had passed"}
    return {"failed": last_lines(done)} if done.returncode else json.loads(done.stdout)


def attempt(setting: Setting, work: Path, deadline: float, before: list[dict[str, Any]]) -> dict[str, Any]:
    """One setting in a process of its own, or why not."""
    shown = [run["seconds"] for run in before if run["model"] == setting.model and "seconds" in run]
    needed, left = SLACK * max(shown, default=GUESS.get(setting.model, 60)), deadline - time.monotonic()
    if left < needed:
        return {"skipped": f"{left:.0f} s are left and it takes about {needed:.0f} s"}
    command = [sys.executable, "-P", __file__, "--setting", json.dumps(asdict(setting)), "--work", str(work)]
    started = time.monotonic()
    try:
        done = run(command, work, left, {} if setting.kernels else {"EFFITRAIN_KERNELS_OFF": "all"})
    except subprocess.TimeoutExpired:
        return {"failed": f"not done when the {left:.0f} s that were left had passed"}
    if done.returncode:
        return {"failed": last_lines(done)}
    return {**json.loads(done.stdout.splitlines()[-1]), "seconds": round(time.monotonic() - started, 1)}


def run(
    command: list[str], work: Path, seconds: float, more: Mapping[str, str] = MappingProxyType({})
) -> subprocess.CompletedProcess[str]:
    """``command`` with a data cache that goes away with ``work``, and ``more`` in its environment."""
    environment = {**os.environ, **more, "XDG_CACHE_HOME": str(work / "cache"), "PYTHONUNBUFFERED": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=ROOT, env=environment)


def measure(setting: Setting, work: Path) -> dict[str, Any]:
    """Run ``setting`` in this process: speed, and the peak of memory against what the plan said."""
    import torch

    from effitrain import api

    data = work / ("samples.jsonl" if setting.packed else "words.txt")
    out = Path(tempfile.mkdtemp(dir=work))
    asked = api.recipe(
        model=setting.model, weights="synthetic", dataset=str(data), format="text", eval_fraction=0.0,
        packing=setting.packed, max_seq_len=setting.max_seq_len, batch_size=setting.tokens // setting.max_seq_len,
        grad_accum=1, max_steps=setting.steps, save_every=setting.steps, recompute=setting.recompute,
        gpu_mem=setting.gpu_mem, fit=setting.fit, output_dir=str(out),
    )  # fmt: skip
    plan = api.plan(asked)
    if not plan.fits:
        return {"skipped": plan.reasons[0]}
    report = api.run(asked)
    assert report is not None
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(out)  # checkpoint and adapters of a 70B take gigabytes
    warm_up = min(WARM_UP, setting.steps - 2)
    speeds = [line["tokens_per_second"] for line in lines[warm_up:]]
    memory = report.memory
    return {
        "planned": report.fit,
        "planned_resident_layers": plan.resident_layers,
        "prune_ratio": plan.prune_ratio,
        "within_budget": memory.measured_peak_bytes <= memory.budget_bytes,
        "prediction_error": round(memory.predicted_peak_bytes / memory.measured_peak_bytes - 1, 4),
        "tokens_per_second_estimate": plan.tokens_per_second_estimate,
        "stream": report.stream,
        "train_seconds": report.seconds,  # without the copies' wait_seconds: those of computing
        "tokens_per_second": round(statistics.median(speeds), 1),
        "tokens_per_second_of_steps": [round(speed, 1) for speed in speeds],
        "tokens_of_steps": [line["tokens"] for line in lines[warm_up:]],
        "predicted_peak_bytes": report.memory.predicted_peak_bytes,
        "measured_peak_bytes": report.memory.measured_peak_bytes,
        "budget_bytes": report.memory.budget_bytes,
        "overhead_bytes": plan.overhead_bytes,
        **(card_figures() if torch.cuda.is_available() else {}),
        "peak_rss_bytes": report.memory.peak_rss_bytes,
        "losses": [line["loss"] for line in lines],
    }


def card_figures() -> dict[str, Any]:
    """What this process took of the card."""
    import torch

    from effitrain.train.memory import cuda_context_bytes

    return {
        "context_bytes": cuda_context_bytes(),
        "reserved_peak_bytes": torch.cuda.max_memory_reserved(),
        "allocated_peak_bytes": torch.cuda.max_memory_allocated(),
    }


def write_words(work: Path) -> None:
    """Random words as running text and as samples of 30 to 600 words; a word is one token or more."""
    source = random.Random(0)
    words = ["".join(source.choices("abcdefghijklmnopqrstuvwxyz", k=source.randint(2, 8))) for _ in range(150_000)]
    (work / "words.txt").write_text(" ".join(words))
    with (work / "samples.jsonl").open("w") as file:
        start = 0
        while start < len(words):
            end = start + source.randint(30, 600)
            file.write(json.dumps({"text": " ".join(words[start:end])}) + "\n")
            start = end


def name_of(case: ElementTree.Element) -> str:
    """Module and name of a test."""
    return f"{case.get('classname')}::{case.get('name')}"


def last_lines(done: subprocess.CompletedProcess[str]) -> str:
    """The end of what a process said."""
    return (done.stderr.strip() or done.stdout.strip())[-1500:]


def say(what: str, result: dict[str, Any]) -> None:
    """One line about a part that is done."""
    shown = {key: value for key, value in result.items() if not isinstance(value, list | dict) or key == "failed"}
    print(f"{what}: {json.dumps(shown)}", flush=True)


if __name__ == "__main__":
    main()
