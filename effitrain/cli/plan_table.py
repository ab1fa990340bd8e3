"""How the terminal shows a plan: no line is wider than the terminal, and none ends in blanks."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console as Terminal
from rich.table import Table

from effitrain.cli.wrap import whole, wrapped
from effitrain.core.plan import Plan, refusal
from effitrain.core.units import format_bytes

_UNTOLD = {("at_once", 1), ("mlp_tiles", 1), ("work", "train")}  # settings that go without saying
_WORDS = {
    "offload": "layer inputs offloaded",
    "streamed": "streamed layers {}",
    "on_disk": "{} of them from the disk",
    "at_once": "{} micro-batches at once",
}
_SMALLEST_SHARE = 0.01  # ledger lines below this share of the peak are summed up in one line
_BLANKS = re.compile(r"(?: |\x1b\[[\d;]*m)+$", re.MULTILINE)  # at the end of a line, and where colours end among them


def print_plan(plan: Plan, terminal: Terminal | None = None, others: bool = False) -> None:
    """The plan as a short table: verdict, settings, and where the bytes go; with ``others`` the other ways too."""
    terminal = terminal or Terminal(highlight=False)
    with terminal.capture() as shown:
        _print_verdict(plan, terminal)
        _print_ledger(plan, terminal)
        if plan.proof:
            _print_proof(plan.proof, terminal)
        _print_each(plan.reasons, terminal)
        if others:
            _print_others(plan, terminal)
    terminal.file.write(_BLANKS.sub(lambda end: end[0].replace(" ", ""), shown.get()))


def _print_verdict(plan: Plan, terminal: Terminal) -> None:
    verdict = "fits" if plan.fits else "does not fit"
    ratio = "" if plan.prune_ratio is None else f" by {plan.prune_ratio:g}"
    params = _count(plan.model.params)
    terminal.print(f"[bold]{plan.model.name}[/] ({params} parameters), {plan.fit}{ratio}: {verdict}.")
    on_card = plan.overhead_bytes > 0
    device, host = ("on the device", "on the host") if on_card else ("in tensors", "for the rest of the process")
    terminal.print(
        f"Peak {format_bytes(plan.peak_bytes)} of {format_bytes(plan.budget_bytes)} {device},"
        f" {format_bytes(plan.host_peak_bytes)} {host}."
    )
    together = wrapped(", ".join(map(whole, _settings(plan))), terminal.width)
    terminal.print(f"[dim]{together}[/]")


def _count(params: int) -> str:
    return f"{params / 1e9:.1f}B" if params >= 1e9 else f"{params / 1e6:.1f}M"


def _print_ledger(plan: Plan, terminal: Terminal) -> None:
    """The lines of the device, the largest first, small ones in one."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title, side in (("what", "left"), ("bytes", "right"), ("how", "left")):
        table.add_column(title, justify=side, no_wrap=title != "how")  # type: ignore[arg-type]
    lines = [line for line in plan.ledger if line.where == "gpu"]
    small = sum(line.bytes for line in lines if line.bytes < _SMALLEST_SHARE * plan.peak_bytes)
    for line in sorted(lines, key=lambda line: -line.bytes):
        if line.bytes >= _SMALLEST_SHARE * plan.peak_bytes:
            table.add_row(line.what, format_bytes(line.bytes), f"[dim]{line.formula}[/]")
    if small:
        table.add_row("the rest", format_bytes(small), "")
    terminal.print(table)


def _print_others(plan: Plan, terminal: Terminal) -> None:
    """The other ways that fit, exact ones first, and why one does not."""
    table = Table(box=None, pad_edge=False, header_style="dim", title="Other ways", title_justify="left")
    speeds = [("tokens/s", "right")] if plan.overhead_bytes else []  # small models on a CPU defy an estimate
    device, host = ("device", "host") if plan.overhead_bytes else ("tensors", "the rest")
    for title, side in (("", "left"), (device, "right"), (host, "right"), *speeds):
        table.add_column(title, justify=side)  # type: ignore[arg-type]
    for way in (way for way in plan.alternatives if way.fits):
        sizes = (format_bytes(way.peak_bytes), format_bytes(way.host_peak_bytes))
        table.add_row(way.why, *sizes, *(f"{way.tokens_per_second_estimate:,.0f}" for _ in speeds))
    if table.row_count:
        terminal.print(table)
    short = [way for way in plan.alternatives if not way.fits and way.prune_ratio is None]
    _print_each([f"{way.fit} does not fit. {way.why}" for way in short if not way.why.startswith("--")], terminal)
    if not plan.fits:
        terminal.print(wrapped(refusal(plan).next_step, terminal.width))


def _print_each(sentences: Iterable[str], terminal: Terminal) -> None:
    """Each behind a dash, wrapped to the terminal's width."""
    table = Table.grid(padding=(0, 1, 0, 0))
    for sentence in sentences:
        table.add_row("[dim]-[/]", f"[dim]{sentence}[/]")
    if table.row_count:
        terminal.print(table)


def _settings(plan: Plan) -> list[str]:
    """The chosen settings that do something, and the estimated speed on a card."""
    shown = {name: value for name, value in asdict(plan.settings).items() if value and (name, value) not in _UNTOLD}
    words = [_WORDS.get(name, name.replace("_", " ") + " {}").format(value) for name, value in shown.items()]
    speed = [f"about {plan.tokens_per_second_estimate:,.0f} tokens/s"] if plan.overhead_bytes and plan.fits else []
    return [*words, *speed]


def _print_proof(proof: Mapping[str, Any], terminal: Terminal) -> None:
    table = Table(
        box=None, pad_edge=False, header_style="dim", title="Proof: the step run on shapes", title_justify="left"
    )
    for title, side in (("what", "left"), ("predicted", "right"), ("tracked", "right")):
        table.add_column(title, justify=side)  # type: ignore[arg-type]
    for part in proof["components"]:
        table.add_row(part["what"], format_bytes(part["predicted_bytes"]), format_bytes(part["tracked_bytes"]))
    terminal.print(table)
    terminal.print(f"The prediction is {round(proof['error'], 3) + 0.0:+.1%} of what was tracked.")
