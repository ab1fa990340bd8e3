"""Small curves over the steps of a run, as SVG that grows with the page."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT, EDGE = 600, 90, 6  # of the drawing's own units
MOST = 300  # points drawn; of more, evenly spaced ones


def curve(metrics: Sequence[Mapping[str, Any]], name: str, key: str, shown: Callable[[float], str]) -> str:
    """A figure of one value by step: its least and its most written beside it; nothing for fewer than two steps.

    Args:
        metrics: the lines of ``metrics.jsonl``.
        name: what the value is, for the caption.
        key: of the value in a line.
        shown: how a value is written.
    """
    if len(metrics) < 2:
        return ""
    chosen = metrics if len(metrics) <= MOST else [metrics[i * (len(metrics) - 1) // (MOST - 1)] for i in range(MOST)]
    values = [float(line[key]) for line in chosen]
    low, high, last = min(values), max(values), metrics[-1]["step"]
    places = ((_x(line["step"], metrics), _y(value, low, high)) for line, value in zip(chosen, values, strict=True))
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    text = f"{name}: {shown(low)} to {shown(high)}" if low < high else f"{name}: {shown(low)} in every step"
    label = escape(f"{name} by step, to step {last:,}", quote=True)
    drawing = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}"><polyline points="{points}"/></svg>'
    return f"<figure><figcaption>{escape(text)}</figcaption>{drawing}</figure>"


def _x(step: int, metrics: Sequence[Mapping[str, Any]]) -> float:
    first, last = metrics[0]["step"], metrics[-1]["step"]
    return EDGE + (WIDTH - 2 * EDGE) * (step - first) / (last - first)


def _y(value: float, low: float, high: float) -> float:
    """From the top: the most is highest, and a value that never changes lies in the middle."""
    share = (value - low) / (high - low) if high > low else 0.5
    return HEIGHT - EDGE - (HEIGHT - 2 * EDGE) * share
