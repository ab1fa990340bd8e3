"""LoRAM in small: what share of the full model's LoRA gain reaches it through an adapter trained on a pruned model.

stories3M (3M parameters) learns GSM8K text: 120 steps of 16 rows of 256 tokens, LoRA of rank 8, first and last layer
whole. The share is of the fall in test loss that a LoRA trained on the full model gains with the same seed and steps.
What the output folder holds already is not measured again, so an interrupted study goes on.

    EFFITRAIN_DATA=DIR python scripts/study_loram.py -o docs            25 minutes on two cores, for -o NEW
    EFFITRAIN_DATA=DIR python scripts/study_loram.py -o docs --curve    ratios x scores x alignment too, with one seed
    EFFITRAIN_DATA=DIR python scripts/study_loram.py -o OUT --quick     a minute: two rows, a thirtieth of the steps
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from statistics import mean

from study.bench import LORA, Bench, Cut, gsm8k
from study.record import Figures, Record, Run, put_between_marks

from effitrain.adapters.storage import AdapterBundle
from effitrain.pruning.recover import recover_factors

ROWS, LENGTH, LR, WARMUP = 16, 256, 3e-3, 1 / 6
CUTS = [Cut(0.25), Cut(0.5), Cut(0.5, align="lsq"), Cut(0.75, align="lsq"), Cut(0.5, parts="ffn+kv", align="lsq")]
CURVE = [
    Cut(0.75), Cut(0.25, align="lsq"),
    *(Cut(0.5, score, align=align) for score in ("taylor", "flap", "magnitude", "random") for align in ("lsq", "none")),
]  # fmt: skip
QUICK = [Cut(0.5), Cut(0.5, align="lsq")]
SEEDS = 3


def main() -> None:
    """Measure what is not known yet, then write table and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--curve", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--workers", type=int, default=2)
    asked = parser.parse_args()
    steps, test_rows = (4, 25) if asked.quick else (120, 150)
    facts = {"model": "stories3M", "text": "GSM8K", "steps": steps, "lr": LR, "test_rows": test_rows}
    measured = partial(measure, Path(os.environ["EFFITRAIN_DATA"]), steps, test_rows)
    record = Record(asked.output / "study_loram.json", facts, asked.workers, measured)
    record.complete(plan(asked.quick, asked.curve))
    print(table(record.runs))
    if (asked.output / "pruning.md").exists():
        put_between_marks(asked.output / "pruning.md", "study_loram", table(record.runs))
    plot(record.runs, asked.output / "study_loram.png")


def plan(quick: bool, curve: bool) -> list[Run]:
    """The runs of the study: the model as it is, LoRA on the full model for each seed, and every way of pruning."""
    runs: list[Run] = [{"what": "base"}]
    for seed in range(1 if quick else SEEDS):
        cuts = QUICK if quick else CUTS + CURVE if curve and seed == 0 else CUTS
        runs += [{"what": "full", "seed": seed}, *({"what": "pruned", "seed": seed, **asdict(cut)} for cut in cuts)]
    return runs


@cache
def bench(data: Path, test_rows: int) -> Bench:
    """What a worker needs, made once."""
    return Bench(data / "models/stories3M", gsm8k(data, "train_3000"), gsm8k(data, "test_500"), test_rows, ROWS, LENGTH)


def measure(data: Path, steps: int, test_rows: int, run: Run) -> Figures:
    """Test losses: of a pruned run those of the small model before and after training, and of the full-size one with
    the recovered adapter.
    """
    on = bench(data, test_rows)
    if run["what"] != "pruned":
        full = on.decoder()
        if run["what"] == "full":
            on.fit(full, steps, run["seed"], LR, WARMUP)
        return {"loss": on.loss(full)}
    cut = Cut(run["ratio"], run["score"], run["parts"], run["align"])
    keep, weights = on.pruned(cut, run["seed"])
    small = on.decoder(keep, weights)
    before = on.loss(small)
    adapters = on.fit(small, steps, run["seed"], LR, WARMUP)
    after = on.loss(small)
    bundle = AdapterBundle(LORA, "", {path: adapter.factors() for path, adapter in adapters.items()})
    recovered = on.loss_with(recover_factors(bundle, keep, on.spec))
    return {"small_before": before, "small_after": after, "recovered": recovered}


def shares(runs: Sequence[Run]) -> dict[tuple[str, str, str, float], list[float]]:
    """Shares of the full LoRA's gain, one a seed, by parts, score, align and ratio."""
    (base,) = (run["loss"] for run in runs if run["what"] == "base")
    full = {run["seed"]: run["loss"] for run in runs if run["what"] == "full"}
    found: dict[tuple[str, str, str, float], list[float]] = {}
    for run in runs:
        if run["what"] == "pruned":
            share = (base - run["recovered"]) / (base - full[run["seed"]])
            found.setdefault((run["parts"], run["score"], run["align"], run["ratio"]), []).append(share)
    return found


def table(runs: Sequence[Run]) -> str:
    """Mean share by way of pruning, as Markdown."""
    lines = ["| parts | score | align | ratio | share of the gain | spread | seeds |", "|---|---|---|---|---|---|---|"]
    for (parts, score, align, ratio), found in sorted(shares(runs).items()):
        spread = f"{min(found):.3f} to {max(found):.3f}"
        lines.append(f"| {parts} | {score} | {align} | {ratio} | {mean(found):.3f} | {spread} | {len(found)} |")
    return "\n".join(lines)


def plot(runs: Sequence[Run], path: Path) -> None:
    """Share against ratio, a colour for each score; circles with alignment, crosses without."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for (parts, score, align, ratio), found in sorted(shares(runs).items()):
        lines.setdefault((parts, score, align), []).append((ratio, mean(found)))
    colours = {what: f"C{number}" for number, what in enumerate(dict.fromkeys(key[:2] for key in lines))}
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for (parts, score, align), points in lines.items():
        style, colour = ("x--" if align == "none" else "o-"), colours[parts, score]
        axes.plot(*zip(*points, strict=True), style, color=colour, label=f"{parts}, {score}, align {align}")
    axes.set(xlabel="share of the pruned parts that is gone", ylabel="share of the full LoRA's gain")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
