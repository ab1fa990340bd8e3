"""Pruning while training against pruning first: validation perplexity at the same ratio for the same training tokens.

stories3M on TinyStories, its own text: half of the FFN channels and one of two KV heads of the inner layers go, by
LoRAPrune during LoRA training, or at once by magnitude, Wanda or Taylor followed by LoRA training for as many steps.
Every method has its best learning rate of the same grid, found with the first seed. What the output folder holds
already is not measured again, so an interrupted study goes on.

    EFFITRAIN_DATA=DIR python scripts/study_loraprune.py -o docs            20 minutes on two idle cores, for -o NEW
    EFFITRAIN_DATA=DIR python scripts/study_loraprune.py -o docs --curve    other ratios too, with one seed
    EFFITRAIN_DATA=DIR python scripts/study_loraprune.py -o docs --why      what of the gap to Wanda lies where
    EFFITRAIN_DATA=DIR python scripts/study_loraprune.py -o OUT --quick     a minute: one seed and rate, few steps
"""

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import Any

from study.bench import EXEMPT, LORA, Bench, Cut, stories
from study.record import Figures, Record, Run, put_between_marks
from torch import Tensor, nn

from effitrain.adapters.base import Adapter, AdapterConfig
from effitrain.core.cut import cut_widths
from effitrain.core.keep import KeepMap, LayerKeep
from effitrain.model.decoder import Decoder
from effitrain.pruning.cut import CutWeights
from effitrain.pruning.loraprune import LoRAPrune
from effitrain.train.hooks import Calls

METHODS = ["loraprune", "wanda", "magnitude", "taylor"]
PARTS = "ffn+kv"
RATES = [1e-3, 2e-3, 3e-3, 4.5e-3]
RATIO, RATIOS, SEEDS = 0.5, [0.2, 0.3, 0.4, 0.6, 0.7], 3
ROWS, LENGTH, WARMUP = 8, 128, 0.03
WHY = [("loraprune", 8), ("exact", 8), ("loraprune", 32)]
WHY_LR = 2e-3


def main() -> None:
    """Measure what is not known yet, then write table and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--curve", action="store_true")
    parser.add_argument("--why", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--workers", type=int, default=2)
    asked = parser.parse_args()
    steps, test_rows = (12, 25) if asked.quick else (240, None)
    facts = {"model": "stories3M", "text": "TinyStories", "steps": steps, "tokens_a_step": ROWS * LENGTH}
    facts["test_rows"] = test_rows or "all"
    measured = partial(measure, Path(os.environ["EFFITRAIN_DATA"]), steps, test_rows)
    record = Record(asked.output / "study_loraprune.json", facts, asked.workers, measured)
    record.complete([{"method": "none", "ratio": 0.0}])
    grid = [pruned(method, lr=rate) for rate in (RATES[1:2] if asked.quick else RATES) for method in METHODS]
    best = best_rates(record.complete(grid))
    if not asked.quick:
        record.complete([pruned(m, seed=seed, lr=best[m]) for seed in range(1, SEEDS) for m in METHODS])
    if asked.curve:
        record.complete([pruned(m, ratio=ratio, lr=best[m]) for ratio in RATIOS for m in METHODS])
    if asked.why:
        record.complete([{"why": estimate, "rank": rank, "lr": WHY_LR} for estimate, rank in WHY])
    tables = {"study_loraprune": table(record.runs), "study_loraprune_why": table_of_why(record.runs)}
    print(*tables.values(), sep="\n\n")
    for mark, text in tables.items():
        if (asked.output / "pruning.md").exists():
            put_between_marks(asked.output / "pruning.md", mark, text)
    plot(record.runs, asked.output / "study_loraprune.png")


def pruned(method: str, ratio: float = RATIO, seed: int = 0, lr: float = RATES[0]) -> Run:
    """A run of a method."""
    return {"method": method, "ratio": ratio, "seed": seed, "lr": lr}


@cache
def bench(data: Path, test_rows: int | None) -> Bench:
    """What a worker needs, made once."""
    train, valid = stories(data, "train"), stories(data, "valid")
    return Bench(data / "models/stories3M", train, valid, test_rows, ROWS, LENGTH)


class Exact(LoRAPrune):
    """LoRAPrune by the whole gradient, which LoRA does not have: what a perfect estimate would choose."""

    def __init__(self, decoder: Decoder, *rest: Any):
        super().__init__(decoder, *rest)
        self.gradients: dict[str, Tensor] = {}
        for index, part in self.scores:
            for path in self._readers(decoder.spec.layers[index], part):
                decoder.get_submodule(path).register_forward_hook(partial(self._watch, path))

    def columns(self, path: str, weight: Tensor) -> Tensor:
        """Sum over rows of |G (W0 + s B A)|."""
        return (self.gradients[path] * (weight + self.adapters[path].delta_weight())).abs().sum(0)

    def _watch(self, path: str, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        def keep(grad: Tensor) -> None:
            self.gradients[path] = grad.flatten(0, -2).t() @ inputs[0].detach().flatten(0, -2)

        if output.requires_grad:
            output.register_hook(keep)


def measure(data: Path, steps: int, test_rows: int | None, run: Run) -> Figures:
    """Validation perplexity of the small model, and which KV heads the inner layers keep."""
    on = bench(data, test_rows)
    if "why" in run:
        return explain(on, steps, run)
    if run["method"] == "none":
        return {"perplexity": math.exp(on.loss(on.decoder()))}
    if run["method"] == "loraprune":
        perplexity, keep = while_training(on, steps, run)
    else:
        keep, _ = on.pruned(Cut(run["ratio"], run["method"], PARTS), run["seed"])
        perplexity = at_once(on, steps, run, keep)
    heads = [layer.kv_heads for layer in keep.layers[EXEMPT[0] : -EXEMPT[1]]]
    return {"perplexity": perplexity, "kv_heads": heads}


def while_training(on: Bench, steps: int, run: Run, kind: type[LoRAPrune] = LoRAPrune) -> tuple[float, KeepMap]:
    """Perplexity after LoRAPrune, and what it kept."""
    made: list[LoRAPrune] = []
    widths = cut_widths(on.spec, run["ratio"], PARTS, EXEMPT, multiple=1)

    def hook(decoder: Decoder, adapters: Mapping[str, Adapter]) -> Calls:
        made.append(kind(decoder, adapters, widths, steps))
        return Calls(made[0].after_backward, made[0].after_step)

    decoder = on.decoder()
    on.fit(decoder, steps, run["seed"], run["lr"], WARMUP, [hook], lora(run))
    return math.exp(on.loss(decoder)), made[0].keep_map("", "")


def at_once(on: Bench, steps: int, run: Run, keep: KeepMap) -> float:
    """Perplexity after training what was cut before the first step."""
    small = on.decoder(keep, CutWeights(on.weights, on.spec, keep))
    on.fit(small, steps, run["seed"], run["lr"], WARMUP, config=lora(run))
    return math.exp(on.loss(small))


def explain(on: Bench, steps: int, run: Run) -> Figures:
    """Perplexity of LoRAPrune and of its groups, or only its channels or heads and Wanda's others, cut at once."""
    run = {**run, "ratio": RATIO, "seed": 0}
    wanda, _ = on.pruned(Cut(RATIO, "wanda", PARTS), 0)
    perplexity, own = while_training(on, steps, run, Exact if run["why"] == "exact" else LoRAPrune)

    def mixed(ffn: KeepMap, heads: KeepMap) -> float:
        layers = [LayerKeep(a.ffn, b.kv_heads) for a, b in zip(ffn.layers, heads.layers, strict=True)]
        return at_once(on, steps, run, KeepMap.of(on.spec, layers, "", ""))

    return {
        "perplexity": perplexity,
        "groups": mixed(own, own),
        "channels": mixed(own, wanda),
        "heads": mixed(wanda, own),
        "wanda": mixed(wanda, wanda),
    }


def lora(run: Run) -> AdapterConfig:
    """The adapters of a run: rank 8, or another with the same scale."""
    rank = run.get("rank", LORA.r)
    return replace(LORA, r=rank, alpha=rank * LORA.alpha / LORA.r)


def best_rates(runs: Sequence[Run]) -> dict[str, float]:
    """By method, the rate of the lowest perplexity at the first ratio with the first seed."""
    tried = [run for run in runs if run.get("method") in METHODS and (run["ratio"], run["seed"]) == (RATIO, 0)]
    worst_first = sorted(tried, key=lambda run: -run["perplexity"])
    return {run["method"]: run["lr"] for run in worst_first}


def at_best(runs: Sequence[Run]) -> dict[tuple[float, str], list[Run]]:
    """The runs of each ratio and method at its best rate."""
    best, found = best_rates(runs), {}
    for run in runs:
        if run.get("method") in METHODS and best[run["method"]] == run["lr"]:
            found.setdefault((run["ratio"], run["method"]), []).append(run)
    return found


def table(runs: Sequence[Run]) -> str:
    """Mean perplexity by ratio and method, as Markdown."""
    lines = ["| ratio | method | lr | perplexity | spread | seeds |", "|---|---|---|---|---|---|"]
    order = [(ratio, method) for ratio in sorted([RATIO, *RATIOS]) for method in METHODS]
    known = at_best(runs)
    for ratio, method in order:
        if found := known.get((ratio, method)):
            values = [run["perplexity"] for run in found]
            spread = f"{min(values):.2f} to {max(values):.2f}"
            rate = f"{found[0]['lr']:g}"
            lines.append(f"| {ratio} | {method} | {rate} | {mean(values):.2f} | {spread} | {len(values)} |")
    return "\n".join(lines)


def table_of_why(runs: Sequence[Run]) -> str:
    """Perplexity by estimate of the gradient and rank, as Markdown."""
    names = {"perplexity": "LoRAPrune", "groups": "its groups, cut at once", "channels": "its channels, Wanda's heads",
             "heads": "Wanda's channels, its heads", "wanda": "Wanda"}  # fmt: skip
    lines = ["| gradient | rank |" + "".join(f" {name} |" for name in names.values()), "|---" * 7 + "|"]
    for run in runs:
        if "why" in run:
            gradient = "whole" if run["why"] == "exact" else "of LoRA"
            figures = "".join(f" {run[name]:.2f} |" for name in names)
            lines.append(f"| {gradient} | {run['rank']} |{figures}")
    return "\n".join(lines)


def plot(runs: Sequence[Run], path: Path) -> None:
    """Perplexity against ratio."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    base = next(run["perplexity"] for run in runs if run.get("method") == "none")
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for method in METHODS:
        points = [
            (ratio, mean(run["perplexity"] for run in found))
            for (ratio, name), found in sorted(at_best(runs).items())
            if name == method
        ]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", label=method)
    axes.axhline(base, color="grey", linestyle=":", label="unpruned")
    axes.set(xlabel="share of the prunable parts that is gone", ylabel="validation perplexity")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
