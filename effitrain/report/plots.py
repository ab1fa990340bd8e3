"""The pictures of a run as PNG: its loss curve, its loss by position, and the timeline of layers that stream."""

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from effitrain.stream.engine import Span

INK, MUTED, GRID = "#1f2328", "#656d76", "#e4e7eb"
TRAIN, EVAL = "#2a78d6", "#d9622b"
SPAN_COLORS = {"compute": "#b8d4f3", "copy": TRAIN, "wait": EVAL}
SMOOTHED_FROM = 30  # steps: a shorter curve is read as it is


def loss_png(
    metrics: Sequence[Mapping[str, Any]], eval_points: Iterable[tuple[int, float]] = (), small: bool = False
) -> bytes:
    """Training loss by step, with the evaluation losses, as PNG bytes of 1600 x 800 pixels.

    Args:
        metrics: the lines of ``metrics.jsonl``; their ``step`` and ``loss`` are drawn, any number of them.
        eval_points: (step, loss) of each evaluation; step 0 is before training.
        small: training was on a pruned model and evaluation is of the full one, which the legend then tells.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), dpi=200, layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per trained token)")
    names = ("training of the small model", "evaluation of the full model") if small else ("training", "evaluation")
    _draw_training(axes, [line["step"] for line in metrics], [line["loss"] for line in metrics], names[0])
    _draw_evaluation(axes, sorted(eval_points), names[1])
    _plain_style(axes)
    return _png(figure)


def timeline_png(spans: Sequence[Span]) -> bytes:
    """Copies, waits and computation of one pass, layer by layer over time, as PNG bytes of 1600 x 800 pixels.

    Args:
        spans: with times in seconds.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import AutoLocator, MaxNLocator

    figure = Figure(figsize=(8, 4), dpi=200, layout="constrained")
    axes = figure.add_subplot(xlabel="seconds", ylabel="layer")
    for kind, color in SPAN_COLORS.items():
        mine = [span for span in spans if span.kind == kind]
        height = 0.8 if kind == "compute" else 0.4  # a copy that hides shows inside the computation it hides behind
        widths = [span.end - span.start for span in mine]
        layers, starts = [span.layer for span in mine], [span.start for span in mine]
        axes.barh(layers, widths, height, left=starts, color=color, label=kind)
    axes.invert_yaxis()
    _plain_style(axes)
    axes.xaxis.set_major_locator(AutoLocator())
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.legend(frameon=False, labelcolor=INK, loc="upper center")
    return _png(figure)


def positions_png(buckets: Sequence[Mapping[str, Any]]) -> bytes:
    """Loss by position in the sample, before and after training, as PNG bytes of 1600 x 800 pixels.

    Args:
        buckets: ``start``, ``end``, ``before`` and ``after``, as in the report.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), dpi=200, layout="constrained")
    axes = figure.add_subplot(xlabel="position in the sample", ylabel="loss (nats per trained token)")
    middles = [(bucket["start"] + bucket["end"]) / 2 for bucket in buckets]
    for when, color in (("before", EVAL), ("after", TRAIN)):
        losses = [bucket[when] for bucket in buckets]
        axes.plot(middles, losses, color=color, linewidth=2, marker="o", markersize=4, label=f"{when} training")
    _plain_style(axes)
    return _png(figure)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def running_mean(values: Sequence[float], decay: float = 0.8) -> list[float]:
    """Exponential mean of ``values`` without the pull towards zero at the start (Adam's bias correction)."""
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        means.append(total / weight)
    return means


def _draw_training(axes: Any, steps: list[int], losses: list[float], name: str) -> None:
    if len(steps) >= SMOOTHED_FROM:
        axes.plot(steps, losses, color=TRAIN, alpha=0.3, linewidth=1)
        axes.plot(steps, running_mean(losses), color=TRAIN, linewidth=2, label=f"{name}, running mean")
    elif steps:
        axes.plot(steps, losses, color=TRAIN, linewidth=2, marker="o", markersize=4, label=name)


def _draw_evaluation(axes: Any, points: list[tuple[int, float]], name: str) -> None:
    if not points:
        return
    steps, losses = zip(*points, strict=True)
    axes.plot(steps, losses, color=EVAL, linewidth=2, marker="D", markersize=6, clip_on=False, label=name)
    for step, loss in {points[0], points[-1]}:
        axes.annotate(f"{loss:.3f}", (step, loss), xytext=(0, 8), textcoords="offset points", ha="center", color=INK)


def _plain_style(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.margins(x=0.04, y=0.12)
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(colors=MUTED, length=0)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(MUTED)
    if axes.lines:
        axes.legend(frameon=False, labelcolor=INK)
