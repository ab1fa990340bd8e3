"""The files that end a run: report.json, report.html and loss.png."""

import json
import platform
import resource
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from effitrain.core.plan import Plan
from effitrain.core.recipe import Recipe
from effitrain.core.report import DataUse, Losses, Memory, Report
from effitrain.core.spec import ModelSpec
from effitrain.core.units import counted, format_bytes
from effitrain.data.prepare import DataStats
from effitrain.evals.positions import ByPosition
from effitrain.io.atomic import write_bytes, write_json, write_text
from effitrain.report.html import render_report
from effitrain.report.plots import loss_png, positions_png, timeline_png
from effitrain.stream.engine import Span, Traffic
from effitrain.train.state import TrainState

_MANY = 0.05  # share of samples cut or lost that is worth a warning
_MORE = 1.05  # measured over predicted peak that is worth a warning
_PACKAGES = ("effitrain", "torch", "transformers", "bitsandbytes", "safetensors", "datasets")


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        recipe: as resolved by the plan.
        plan: what was predicted, for the longest micro-batch of the data.
        state: where training ended.
        data: counts of the training data.
        evals: (step, loss) on the evaluation set, the first one before training.
        peak_bytes: most bytes on the device.
        stream: what ``stream_figures`` says, where layers streamed.
        timeline: of the last streamed pass, in seconds.
        prune: what pruning and recovery did, for a run that pruned.
        positions: losses on the evaluation set by position, where its samples are long.
        samples: prompts of the evaluation set, and their answers before and after training.
        rope: what ``rope_figures`` says, where positions were scaled.
        lisa: which layers were trained how often, and what they took, where layers took turns.
    """

    recipe: Recipe
    plan: Plan
    state: TrainState
    data: DataStats
    evals: list[tuple[int, float]]
    peak_bytes: int
    stream: Mapping[str, Any] | None = None
    timeline: Sequence[Span] = ()
    prune: Mapping[str, Any] | None = None
    positions: ByPosition | None = None
    samples: Sequence[Mapping[str, str]] | None = None
    rope: Mapping[str, Any] | None = None
    lisa: Mapping[str, Any] | None = None


def write_report(folder: Path, run: Outcome) -> Report:
    """Write the report of a finished run; report.json comes last, for it marks the run as finished."""
    report = _report(run, "adapter" if (folder / "adapter").is_dir() else None)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    png = loss_png(metrics, run.evals, report.trained_small)
    write_bytes(folder / "loss.png", png)
    pictures = (
        png,
        timeline_png(run.timeline) if run.timeline else None,
        positions_png(report.positions) if report.positions else None,
    )
    write_text(folder / "report.html", render_report(report.to_json(), run.plan.to_json(), metrics, *pictures))
    write_json(folder / "report.json", report.to_json())
    return report


def _report(run: Outcome, adapter: str | None) -> Report:
    recipe, plan, state, data = run.recipe, run.plan, run.state, run.data
    return Report(
        model=recipe.model,
        fit=plan.fit,
        method=recipe.method,
        steps=state.step,
        tokens=state.tokens,
        seconds=state.seconds,
        loss=Losses(state.first_loss, state.last_loss, *_ends([loss for _, loss in run.evals])),
        memory=Memory(plan.budget_bytes, plan.peak_bytes, run.peak_bytes, _peak_rss_bytes()),
        data=DataUse(data.samples, data.trained_share, data.truncated, data.dropped),
        versions=versions(),
        warnings=tuple(_warnings(run)),
        adapter=adapter,
        stream=run.stream,
        prune=run.prune,
        positions=run.positions.rows() if run.positions else None,
        samples=run.samples,
        rope=run.rope,
        lisa=run.lisa,
    )


def rope_figures(recipe: Recipe, spec: ModelSpec, base: str, folder: Path) -> dict[str, Any] | None:
    """The ``rope`` part of the report: how positions were scaled, and the line that loads the base model so; None where
    they were not.

    Args:
        recipe: as resolved by the plan.
        spec: of the model with those positions.
        base: its folder or hub id, for transformers.
        folder: holds the scaled config.json.
    """
    if recipe.rope_scaling == "none":
        return None
    load = f"AutoModelForCausalLM.from_pretrained({base!r}, config=AutoConfig.from_pretrained({str(folder)!r}))"
    facts = {"scaling": recipe.rope_scaling, "factor": recipe.rope_factor, "max_positions": spec.max_positions}
    return {**facts, "load_with": load}


def stream_figures(
    before: Traffic | None,
    after: Traffic,
    streamed: int,
    resident: int,
    at_once: int,
    written: int,
    allocations: int | None,
) -> dict[str, Any]:
    """The ``stream`` part of the report: what was copied between two counts, those before and after training.

    Args:
        before: training.
        after: training.
        streamed: layers that visit the device.
        resident: layers that stay there.
        at_once: micro-batches that pass a layer together.
        written: layers in host memory that were written to.
        allocations: requests for device memory in steps after the second; None on a CPU, or where no third was taken.
    """
    past = before or Traffic()
    part = Traffic(
        after.planned - past.planned,
        after.copies - past.copies,
        after.bytes_copied - past.bytes_copied,
        after.copy_seconds - past.copy_seconds,
        after.wait_seconds - past.wait_seconds,
    )
    return {
        "streamed_layers": streamed,
        "resident_layers": resident,
        "micro_batches_together": at_once,
        "bytes_copied": part.bytes_copied,
        "copies": part.copies,
        "copies_planned": part.planned,
        "layers_copied_back": written,
        "allocations_in_steady_state": allocations,
        "copy_seconds": part.copy_seconds,
        "wait_seconds": part.wait_seconds,
        "hidden_share": part.hidden_share,
    }


def _warnings(run: Outcome) -> Iterator[str]:
    """What a user should know of a run that went through."""
    plan, data, evals = run.plan, run.data, run.evals
    lost = data.truncated + data.dropped
    if lost > _MANY * (data.samples + data.dropped):
        yield (
            f"{counted(data.truncated, 'sample')} cut at {plan.settings.max_seq_len} tokens, {data.dropped} left out:"
            " a larger --max-seq-len keeps more."
        )
    if not evals:
        yield "There was no evaluation set, so whether the model got better was not measured."
    elif evals[-1][1] > evals[0][1]:
        yield _rose(run.recipe, plan, evals[0][1], evals[-1][1])
    if plan.fit == "prune" and run.recipe.prune_method == "loraprune" and run.recipe.prune_exempt != (0, 0):
        yield (
            "Stock transformers does not load the model, whose first and last layers are wider than the others: the"
            " verbs here do. --prune-exempt 0,0 makes one that it loads."
        )
    if run.positions and run.positions.warning:
        yield run.positions.warning
    if run.peak_bytes > _MORE * plan.peak_bytes:
        yield f"The step took {format_bytes(run.peak_bytes)}, the plan expected {format_bytes(plan.peak_bytes)}."


def _rose(recipe: Recipe, plan: Plan, before: float, after: float) -> str:
    if plan.fit == "prune" and recipe.prune_method == "loraprune":
        return (
            f"The evaluation loss rose from {before:.4f} of the whole model to {after:.4f} of the pruned one: a smaller"
            " --prune-ratio costs less, and more steps win more of it back."
        )
    return f"The evaluation loss rose from {before:.4f} to {after:.4f}: try a smaller --lr."


def _ends(scored: Sequence[float]) -> tuple[float | None, float | None]:
    """The first and the last evaluation; one alone is the one before training."""
    return (scored[0] if scored else None, scored[-1] if len(scored) > 1 else None)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide results."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _peak_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
