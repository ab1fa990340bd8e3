"""LISA, LoRA and full tuning in small: test loss after equal steps at equal grids of learning rates.

stories3M (3M parameters) learns Alpaca or GSM8K text: 40 steps of 8 rows of 64 tokens. Arms: LoRA of rank 8, full
tuning, LISA with two layers at a time, embedding, head and last norm frozen, at the best of three intervals (chosen on
the first seed), and lisa-delta at that interval and LISA's best rate. An arm's rate is the best of the grid by its mean
over the seeds.

    EFFITRAIN_DATA=DIR python scripts/study_lisa.py -o docs            half an hour on one core; goes on after a stop
    EFFITRAIN_DATA=DIR python scripts/study_lisa.py -o OUT --quick     seconds: a few steps of a few runs
"""

import argparse
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from study.bench import Bench, alpaca, gsm8k
from study.measured import machine
from study.record import put_between_marks

TEXTS = {
    "alpaca": lambda data: (alpaca(data)[:1800], alpaca(data)[1800:]),
    "gsm8k": lambda data: (gsm8k(data, "train_3000"), gsm8k(data, "test_500")),
}
RATES, INTERVALS, RANKS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), (3, 10, 20), (8, 64)
LENGTH, ROWS = 64, 8
Run = dict[str, Any]


def main() -> None:
    """Run what is not there yet, write JSON after every run, and put the table into lisa.md where that is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    steps, seeds, rates = (4, 1, RATES[2:3]) if asked.quick else (asked.steps, asked.seeds, RATES)
    data, path = Path(os.environ["EFFITRAIN_DATA"]), asked.output / "study_lisa.json"
    asked.output.mkdir(parents=True, exist_ok=True)
    shape = {"model": "stories3M", "steps": steps, "rows": ROWS, "length": LENGTH}
    study: dict[str, Any] = {**shape, "base": {}, "runs": []}
    if path.exists() and (before := json.loads(path.read_text())).items() >= shape.items():
        study = before
    here = machine()
    for name in ["gsm8k"] if asked.quick else TEXTS:
        train, test = TEXTS[name](data)
        bench = Bench(data / "models/stories3M", train, test, 10 if asked.quick else 150, ROWS, LENGTH)
        study["base"][name] = bench.loss(bench.decoder())
        for arm in _arms(study["runs"], name, seeds, rates):
            started = time.time()
            made = bench.tune(steps, **{key: value for key, value in arm.items() if key != "text"})
            study["runs"].append({**arm, "loss": made})
            study["machine"] = here
            path.write_text(json.dumps(study, indent=1) + "\n")
            print(f"{name} {arm}: {made:.4f}, {time.time() - started:.0f} s", flush=True)
    report = table(study)
    print(report)
    page = asked.output / "lisa.md"
    if page.exists():
        put_between_marks(page, "study_lisa", report)


def _arms(runs: list[Run], text: str, seeds: int, rates: Sequence[float]) -> Iterator[Run]:
    """The runs that are missing, one at a time; later ones depend on what earlier ones gave."""
    for seed in range(seeds):
        for lr in rates:
            for method in ("lora", "full"):
                yield from _missing(runs, {"text": text, "seed": seed, "method": method, "lr": lr})
            for interval in INTERVALS if seed == 0 else [interval_of(runs, text)]:
                arm = {"text": text, "seed": seed, "method": "lisa", "lr": lr, "lisa_interval": interval}
                yield from _missing(runs, arm)
    interval = interval_of(runs, text)
    lr = best(runs, {"text": text, "method": "lisa", "lisa_interval": interval})[0]
    for rank in RANKS:
        for seed in range(seeds):
            arm = {"text": text, "seed": seed, "method": "lisa-delta", "lr": lr, "lisa_interval": interval}
            yield from _missing(runs, {**arm, "lora_r": rank})


def _missing(runs: list[Run], arm: Run) -> Iterator[Run]:
    if not any(run.items() >= arm.items() for run in runs):
        yield arm


def interval_of(runs: list[Run], text: str) -> int:
    """LISA's best interval on the first seed, each at its best rate."""
    first = [run for run in runs if (run["text"], run["seed"], run["method"]) == (text, 0, "lisa")]
    return int(min(first, key=lambda run: run["loss"])["lisa_interval"])


def best(runs: list[Run], arm: Run) -> tuple[float, list[float]]:
    """The rate of the lowest mean loss of ``arm``, and the losses at it by seed."""
    by_rate: dict[float, list[float]] = {}
    for run in runs:
        if run.items() >= arm.items():
            by_rate.setdefault(run["lr"], []).append(run["loss"])
    return min(by_rate.items(), key=lambda item: mean(item[1]))


def table(study: Mapping[str, Any]) -> str:
    """Every arm at its best rate, as Markdown."""
    lines = ["| text | arm | lr | test loss | spread | share of LoRA's gain | seeds |", "|---|---|---|---|---|---|---|"]
    runs = study["runs"]
    for text, base in study["base"].items():
        interval = interval_of(runs, text)
        arms = {
            "LoRA, rank 8": {"method": "lora"},
            "full": {"method": "full"},
            f"LISA, 2 layers, every {interval} steps": {"method": "lisa", "lisa_interval": interval},
            **{f"lisa-delta, rank {rank}": {"method": "lisa-delta", "lora_r": rank} for rank in RANKS},
        }
        lora = base - mean(best(runs, {"text": text, "method": "lora"})[1])
        lines.append(f"| {text} | untrained | | {base:.4f} | | | |")
        for name, arm in arms.items():
            lr, losses = best(runs, {"text": text, **arm})
            spread, share = f"{min(losses):.4f} to {max(losses):.4f}", (base - mean(losses)) / lora
            lines.append(f"| {text} | {name} | {lr:g} | {mean(losses):.4f} | {spread} | {share:.2f} | {len(losses)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
