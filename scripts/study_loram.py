"""LoRAM in small: what share of the full model's LoRA gain reaches it through an adapter trained on a pruned model.

stories3M (3M parameters) learns GSM8K text: 120 steps of 16 rows of 256 tokens, LoRA of rank 8, first and last layer
whole. The share is of the fall in test loss that a LoRA trained on the full model gains with the same seed and steps.

    EFFITRAIN_DATA=DIR python scripts/study_loram.py -o docs            about 3 minutes a row and seed on one core
    EFFITRAIN_DATA=DIR python scripts/study_loram.py -o OUT --quick     two minutes, a few rows, a tenth of the steps
"""

import argparse
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from study.bench import LORA, Bench, Cut, gsm8k

from effitrain.adapters.storage import AdapterBundle
from effitrain.pruning.recover import recover_factors

LR = 3e-3
CUTS = [
    Cut(0.5, align="lsq"), Cut(0.75, align="lsq"), Cut(0.5), Cut(0.25), Cut(0.25, align="lsq"), Cut(0.75),
    Cut(0.5, parts="ffn+kv", align="lsq"), Cut(0.5, "taylor", align="lsq"), Cut(0.5, "flap", align="lsq"),
    Cut(0.5, "magnitude", align="lsq"), Cut(0.5, "random", align="lsq"), Cut(0.5, parts="ffn+kv"),
    Cut(0.5, "taylor"), Cut(0.5, "flap"), Cut(0.5, "magnitude"), Cut(0.5, "random"),
]  # fmt: skip
QUICK = [Cut(0.5), Cut(0.5, align="lsq")]


def main() -> None:
    """Run what is asked for and write JSON after every row, then table and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=len(CUTS), help="the first rows of the table only")
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    data = Path(os.environ["EFFITRAIN_DATA"])
    bench = Bench(
        data / "models/stories3M", gsm8k(data, "train_3000"), gsm8k(data, "test_500"), 25 if asked.quick else 150
    )
    steps, seeds, cuts = (4, 1, QUICK) if asked.quick else (asked.steps, asked.seeds, CUTS[: asked.rows])
    study: dict[str, Any] = {"model": "stories3M", "text": "GSM8K", "steps": steps, "lr": LR, "base": 0.0, "runs": []}
    study["base"] = bench.loss(bench.decoder())
    asked.output.mkdir(parents=True, exist_ok=True)
    for seed in range(seeds):
        started = time.time()
        full = bench.decoder()
        bench.fit(full, steps, seed, LR)
        whole = bench.loss(full)
        print(
            f"seed {seed}: base {study['base']:.3f}, full LoRA {whole:.3f}, {time.time() - started:.0f} s", flush=True
        )
        for cut in cuts:
            run = {"seed": seed, **asdict(cut), **measure(bench, cut, steps, seed)}
            run["share"] = (study["base"] - run["recovered"]) / (study["base"] - whole)
            study["runs"].append({**run, "full_lora": whole})
            (asked.output / "study_loram.json").write_text(json.dumps(study, indent=1) + "\n")
            print(f"  {cut}: {run['share']:.3f}", flush=True)
    print(table(study["runs"]))
    plot(study["runs"], asked.output / "study_loram.png")


def measure(bench: Bench, cut: Cut, steps: int, seed: int) -> dict[str, float]:
    """Test losses of the small model before and after training, and of the full one with the recovered adapter."""
    keep, weights = bench.pruned(cut, seed)
    small = bench.decoder(keep, weights)
    before = bench.loss(small)
    adapters = bench.fit(small, steps, seed, LR)
    after = bench.loss(small)
    bundle = AdapterBundle(LORA, "", {path: adapter.factors() for path, adapter in adapters.items()})
    recovered = bench.loss_with(recover_factors(bundle, keep, bench.spec))
    return {"small_before": before, "small_after": after, "recovered": recovered}


def table(runs: list[Mapping[str, Any]]) -> str:
    """Mean share by way of pruning, as Markdown."""
    lines = ["| parts | score | align | ratio | share of the gain | spread | seeds |", "|---|---|---|---|---|---|---|"]
    ways = list(dict.fromkeys((r["parts"], r["score"], r["align"], r["ratio"]) for r in runs))
    for parts, score, align, ratio in ways:
        shares = [
            r["share"] for r in runs if (r["parts"], r["score"], r["align"], r["ratio"]) == (parts, score, align, ratio)
        ]
        spread = f"{min(shares):.3f} to {max(shares):.3f}"
        lines.append(f"| {parts} | {score} | {align} | {ratio} | {mean(shares):.3f} | {spread} | {len(shares)} |")
    return "\n".join(lines)


def plot(runs: list[Mapping[str, Any]], path: Path) -> None:
    """Share against ratio, with and without alignment."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for align, style in (("none", "o--"), ("lsq", "o-")):
        points: dict[float, list[float]] = {}
        for run in runs:
            if (run["parts"], run["score"], run["align"]) == ("ffn", "wanda", align):
                points.setdefault(run["ratio"], []).append(run["share"])
        ratios = sorted(points)
        axes.plot(ratios, [mean(points[ratio]) for ratio in ratios], style, label=f"align {align}")
    axes.set(xlabel="share of FFN channels pruned", ylabel="share of the full LoRA's gain", ylim=(0.5, 1.0))
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
