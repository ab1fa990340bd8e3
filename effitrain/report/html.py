"""The report of a run as one HTML page that needs nothing beside itself: no script, no link, the plots inside. It is
read on a phone as well: what is wider than the page scrolls by itself.
"""

from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from effitrain.core.units import counted, format_bytes
from effitrain.report.curves import curve
from effitrain.report.style import PAGE

PLACES = {"gpu": "On the device, at the peak", "host": "In host memory", "disk": "On disk"}
STEP_ROWS = 25  # steps listed at most, evenly spaced; metrics.jsonl has them all
# Of a ledger's lines by size; all beyond share the last. Lines below the share go without a label.
COLOURS = ("#2a78d6", "#d9622b", "#3f9b5f", "#8a63c9", "#c9a227", "#4aa8b5", "#b5527a", "#8b949e")
LABELLED = 0.02
Row = Sequence[object]


def render_report(
    report: Mapping[str, Any],
    plan: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    loss_png: bytes | None,
    timeline_png: bytes | None = None,
    positions_png: bytes | None = None,
) -> str:
    """The page for a run.

    Args:
        report: content of ``report.json``.
        plan: content of ``plan.json``.
        metrics: the lines of ``metrics.jsonl``.
        loss_png: the loss curve, or None to leave it out.
        timeline_png: copies and computation of a streamed pass, or None.
        positions_png: the loss by position, or None.
    """
    sections = [
        _headline(report),
        _warnings(report["warnings"]),
        _section(
            "Loss", _picture("Loss by step", loss_png) + _steps(metrics, bool(report["prune"] and report["adapter"]))
        ),
        _section("Samples", _samples(report.get("samples") or ()) or f"<p>{_why_no_samples(report)}</p>"),
        _section("Training by step", _curves(metrics)),
        _section("Loss by position", _picture("Loss by position", positions_png) + _positions(report["positions"])),
        _section("Memory", _memory(report["memory"]) + _ledger(plan["ledger"])),
        _section("Plan", _list(plan.get("reasons", ())) + _pairs(plan.get("settings", {}))),
        _section("Data", _pairs(report["data"])),
        _section("Streaming", _pairs(report["stream"] or {}) + _picture("Layers by time", timeline_png)),
        _section("Pruning", _pairs(report["prune"] or {})),
        _section("Scaled positions", _pairs(report.get("rope") or {})),
        _section("Layers by turns", _pairs(report.get("lisa") or {})),
        _section("Versions", _pairs(report["versions"])),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>effitrain: {escape(str(report['model']))}</title>\n<style>\n{PAGE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, sections))
        + "\n</main>\n</body>\n</html>\n"
    )


def _headline(report: Mapping[str, Any]) -> str:
    loss = report["loss"]
    name, before, after = "Evaluation loss", loss["eval_before"], loss["eval_after"]
    if report["prune"] and report["adapter"]:
        name = "Evaluation loss of the full model"
    if before is None or after is None:
        name, before, after = "Training loss", loss["first"], loss["last"]
    measured = before is not None and after is not None
    big = f"{before:.3f} → {after:.3f} <small>{after / before - 1:+.1%}</small>" if measured else "not measured"
    facts = {
        "steps": f"{report['steps']:,}",
        "tokens": f"{report['tokens']:,}",
        "time": format_seconds(report["seconds"]),
        "tokens/s": f"{report['tokens_per_second']:,.0f}",
        "device peak": format_bytes(report["memory"]["measured_peak_bytes"]),
    }
    tiles = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in facts.items())
    subtitle = " · ".join(
        filter(None, [report["method"], report["fit"], report["adapter"] and f"{report['adapter']}/"])
    )
    return (
        f"<header><h1>{escape(str(report['model']))}</h1><p>{escape(subtitle)}</p></header>\n"
        f'<p class="loss"><span>{name}</span>{big}</p>\n<dl class="tiles">{tiles}</dl>'
    )


def _warnings(warnings: Iterable[str]) -> str:
    items = _list(warnings)
    return f'<section class="warnings"><h2>Warnings</h2>{items}</section>' if items else ""


def _picture(alt: str, png: bytes | None) -> str:
    if png is None:
        return ""
    return f'<div class="wide"><img alt="{alt}" src="data:image/png;base64,{b64encode(png).decode()}"></div>'


def _samples(samples: Iterable[Mapping[str, str]]) -> str:
    """What the model answered before and after, beside what the data has; blank answers are said to be none."""
    parts = (("wanted", "in the data"), ("before", "before training"), ("after", "after training"))
    return "".join(
        f'<div class="sample"><pre>{escape(sample["prompt"].strip())}</pre><dl>'
        + "".join(f"<dt>{name}</dt><dd>{escape(sample[key].strip()) or '<i>nothing</i>'}</dd>" for key, name in parts)
        + "</dl></div>"
        for sample in samples
    )


def _why_no_samples(report: Mapping[str, Any]) -> str:
    if report["loss"]["eval_before"] is None:
        return "No answers: there is no evaluation set to take samples from."
    if report["prune"] and report["adapter"]:
        return "No answers: a small model was trained, and the full one is only scored."
    if report["stream"]:
        return "No answers: layers stream, and every token of an answer would fetch them all once more."
    return "No answers: no sample of the evaluation set is short enough, or they would take more memory than training."


def _curves(metrics: Sequence[Mapping[str, Any]]) -> str:
    return (
        curve(metrics, "Learning rate", "lr", lambda value: f"{value:.2e}")
        + curve(metrics, "Tokens per second", "tokens_per_second", lambda value: f"{value:,.0f}")
        + curve(metrics, "Device peak so far", "device_peak_bytes", lambda value: format_bytes(int(value)))
    )


def _steps(metrics: Sequence[Mapping[str, Any]], small: bool) -> str:
    if not metrics:
        return ""
    count = min(STEP_ROWS, len(metrics))
    chosen = [metrics[round(i * (len(metrics) - 1) / max(1, count - 1))] for i in range(count)]
    header = ["step", "loss", "lr", "gradient norm", "tokens", "tokens/s", "device peak"]
    rows = [
        [
            *(f"{line['step']:,}", f"{line['loss']:.4f}", f"{line['lr']:.2e}", f"{line['grad_norm']:.3f}"),
            *(f"{line['tokens']:,}", f"{line['tokens_per_second']:,.0f}", format_bytes(line["device_peak_bytes"])),
        ]
        for line in chosen
    ]
    of = " of the small model" if small else ""
    return f"<details><summary>{counted(len(metrics), 'step')}{of}</summary>{_table(header, rows)}</details>"


def _positions(buckets: Sequence[Mapping[str, Any]] | None) -> str:
    rows = [
        [f"{b['start']:,} to {b['end'] - 1:,}", f"{b['tokens']:,}", f"{b['before']:.4f}", f"{b['after']:.4f}"]
        for b in buckets or ()
    ]
    return _table(["positions", "tokens", "loss before", "loss after"], rows) if rows else ""


def _memory(memory: Mapping[str, int]) -> str:
    """Bars of the planned and the measured peak; the mark is the budget."""
    budget, planned, measured = (memory[f"{name}_bytes"] for name in ("budget", "predicted_peak", "measured_peak"))
    full = max(budget, planned, measured, 1)

    def bar(name: str, size: int, over: bool) -> str:
        share = f" ({size / budget:.0%} of the budget)" if budget else ""
        return (
            f'<div class="bar"><span>{name}</span><div class="track"><i class="{"over" if over else name}" '
            f'style="width:{100 * size / full:.2f}%"></i><b style="left:{100 * budget / full:.2f}%"></b></div>'
            f"<span>{escape(format_bytes(size) + share)}</span></div>"
        )

    return (
        bar("planned", planned, planned > budget)
        + bar("measured", measured, measured > budget)
        + f"<p>Device budget {escape(format_bytes(budget))}. The whole process held at most "
        f"{escape(format_bytes(memory['peak_rss_bytes']))} of host memory.</p>"
    )


def _ledger(ledger: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for where, title in PLACES.items():
        lines = [line for line in ledger if line["where"] == where]
        total = sum(line["bytes"] for line in lines)
        rows = [[line["what"], format_bytes(line["bytes"]), line["formula"]] for line in lines]
        if lines:
            table = _table(["what", "size", "formula"], [*rows, ["sum", format_bytes(total), ""]])
            parts.append(f"<h3>{title}</h3>{_stack(lines)}{table}")
    return f'<div class="ledger">{"".join(parts)}</div>' if parts else ""


def _stack(lines: Sequence[Mapping[str, Any]]) -> str:
    """One bar of all lines, the largest first, and what its colours mean."""
    total = max(1, sum(line["bytes"] for line in lines))
    ranked = sorted(lines, key=lambda line: -line["bytes"])
    segments, legend = "", ""
    for number, line in enumerate(ranked):
        share, colour = line["bytes"] / total, COLOURS[min(number, len(COLOURS) - 1)]
        label = f"{line['what']} {format_bytes(line['bytes'])}"
        segments += f'<i style="width:{100 * share:.2f}%;background:{colour}" title="{escape(label, quote=True)}"></i>'
        if number < len(COLOURS) - 1 and share >= LABELLED:
            legend += f'<span><i style="background:{colour}"></i>{escape(label)}</span>'
    return f'<div class="stack">{segments}</div><p class="legend">{legend}</p>'


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def _list(items: Iterable[str]) -> str:
    inside = "".join(f"<li>{escape(str(item))}</li>" for item in items)
    return f"<ul>{inside}</ul>" if inside else ""


def _pairs(pairs: Mapping[str, object]) -> str:
    rows = "".join(
        f"<tr><th>{escape(key.replace('_', ' '))}</th><td>{escape(_plain(key, value))}</td></tr>"
        for key, value in pairs.items()
    )
    return f'<div class="wide"><table class="pairs">{rows}</table></div>' if rows else ""


def _table(header: Sequence[str], rows: Iterable[Row]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _plain(key: str, value: object) -> str:
    """A value as people read it, by the unit its key names."""
    if isinstance(value, list | tuple):
        shown = [_plain(key, one) for one in value]
        same = len(shown) > 1 and len({*shown}) == 1
        return f"{shown[0]} (all {len(shown)})" if same else ", ".join(shown) or "none"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int | float) and key.endswith(("bytes", "bytes_copied")):
        return format_bytes(int(value))
    if isinstance(value, float) and key.endswith("_share"):
        return f"{value:.1%}"
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def format_seconds(seconds: float) -> str:
    """``12.3 s``, ``4 min 05 s`` or ``3 h 20 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
