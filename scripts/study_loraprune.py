"""Pruning while training against pruning first: validation perplexity at the same ratio for the same training tokens.

stories3M on TinyStories, its own text: half of the FFN channels and one of two KV heads of the inner layers go, by
LoRAPrune during LoRA training, or at once by magnitude, Wanda or Taylor followed by LoRA training for as many steps.
Every method is given its best learning rate of the same grid.

    EFFITRAIN_DATA=DIR python scripts/study_loraprune.py -o docs            about half an hour on two idle cores
    EFFITRAIN_DATA=DIR python scripts/study_loraprune.py -o OUT --quick     two minutes: one seed and rate, few steps
"""

import argparse
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from study.bench import EXEMPT, Bench, Cut, stories

from effitrain.adapters.base import Adapter
from effitrain.core.cut import cut_widths
from effitrain.model.decoder import Decoder
from effitrain.pruning.loraprune import LoRAPrune
from effitrain.train.hooks import Calls

METHODS = ["loraprune", "magnitude", "wanda", "taylor"]
PARTS = "ffn+kv"
RATES = [1e-3, 3e-3, 6e-3]
RATIOS = [0.5, 0.2, 0.3, 0.4, 0.6, 0.7]


def main() -> None:
    """Run the grid and write JSON after every run, then table and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ratios", type=int, default=len(RATIOS), help="the first ratios only")
    parser.add_argument("--rates", type=int, default=len(RATES), help="the first learning rates only")
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    data = Path(os.environ["EFFITRAIN_DATA"])
    bench = Bench(data / "models/stories3M", stories(data, "train"), stories(data, "valid"), 25 if asked.quick else 100)
    steps, seeds = (4, 1) if asked.quick else (asked.steps, asked.seeds)
    ratios, rates = (RATIOS[:1], RATES[1:2]) if asked.quick else (RATIOS[: asked.ratios], RATES[: asked.rates])
    study: dict[str, Any] = {"model": "stories3M", "text": "TinyStories", "steps": steps, "runs": []}
    study["base"] = math.exp(bench.loss(bench.decoder()))
    print(f"unpruned: perplexity {study['base']:.3f}", flush=True)
    asked.output.mkdir(parents=True, exist_ok=True)
    for seed in range(seeds):
        for ratio in ratios:
            for method in METHODS:
                for rate in rates if ratio == RATIOS[0] else best_rate(study["runs"], method):
                    loss = measure(bench, method, ratio, steps, seed, rate)
                    run = {"method": method, "ratio": ratio, "seed": seed, "lr": rate, "perplexity": math.exp(loss)}
                    study["runs"].append(run)
                    (asked.output / "study_loraprune.json").write_text(json.dumps(study, indent=1) + "\n")
                    print(run, flush=True)
    print(table(study["runs"]))
    plot(study["runs"], study["base"], asked.output / "study_loraprune.png")


def measure(bench: Bench, method: str, ratio: float, steps: int, seed: int, rate: float) -> float:
    """Validation loss of the small model."""
    if method != "loraprune":
        keep, weights = bench.pruned(Cut(ratio, method, PARTS), seed)
        small = bench.decoder(keep, weights)
        bench.fit(small, steps, seed, rate)
        return bench.loss(small)
    widths = cut_widths(bench.spec, ratio, PARTS, EXEMPT, multiple=1)

    def hook(decoder: Decoder, adapters: Mapping[str, Adapter]) -> Calls:
        pruner = LoRAPrune(decoder, adapters, widths, steps)
        return Calls(pruner.after_backward, pruner.after_step)

    masked = bench.decoder()
    bench.fit(masked, steps, seed, rate, [hook])
    return bench.loss(masked)


def best_rate(runs: list[Mapping[str, Any]], method: str) -> list[float]:
    """The rate of the lowest mean perplexity at the first ratio."""
    at: dict[float, list[float]] = {}
    for run in runs:
        if run["method"] == method and run["ratio"] == RATIOS[0]:
            at.setdefault(run["lr"], []).append(run["perplexity"])
    return [min(at, key=lambda rate: mean(at[rate]))]


def table(runs: list[Mapping[str, Any]]) -> str:
    """Mean perplexity by ratio and method, each at its best rate, as Markdown."""
    lines = ["| ratio | method | lr | perplexity | spread | seeds |", "|---|---|---|---|---|---|"]
    for ratio in sorted({run["ratio"] for run in runs}):
        for method in METHODS:
            (rate,) = best_rate(runs, method)
            found = [r["perplexity"] for r in runs if (r["ratio"], r["method"], r["lr"]) == (ratio, method, rate)]
            if found:
                spread = f"{min(found):.3f} to {max(found):.3f}"
                lines.append(f"| {ratio} | {method} | {rate:g} | {mean(found):.3f} | {spread} | {len(found)} |")
    return "\n".join(lines)


def plot(runs: list[Mapping[str, Any]], base: float, path: Path) -> None:
    """Perplexity against ratio."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for method in METHODS:
        (rate,) = best_rate(runs, method)
        points: dict[float, list[float]] = {}
        for run in runs:
            if (run["method"], run["lr"]) == (method, rate):
                points.setdefault(run["ratio"], []).append(run["perplexity"])
        axes.plot(sorted(points), [mean(points[ratio]) for ratio in sorted(points)], "o-", label=method)
    axes.axhline(base, color="grey", linestyle=":", label="unpruned")
    axes.set(xlabel="share of the prunable parts that is gone", ylabel="validation perplexity")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
