"""What fits which card: a table for the README, from configurations and data sheets alone.

    python scripts/memory_table.py [--write README.md] [--json benchmarks/memory_table.json]

Presets, cards and lengths are those of people's questions; everything else is a default of ``effitrain plan``. Speeds
are estimates from data sheets, never measured. ``--write`` puts the table between the marks in a file.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from effitrain.core.budget import MemoryBudget, make_budget
from effitrain.core.plan import make_plan
from effitrain.core.presets import find_preset
from effitrain.core.recipe import make_recipe
from effitrain.core.spec import spec_from_config

PRESETS = ("llama-3.2-1b", "llama-3.1-8b", "qwen2.5-32b", "llama-70b", "llama-405b")
CARDS = {"rtx4060": 8, "rtx3060": 12, "rtx4080": 16, "rtx4090": 24, "a6000": 48}
LENGTHS = (512, 2048, 8192)
HOST = 64 * 2**30
MARKS = ("<!-- memory table -->", "<!-- end of memory table -->")


def main() -> None:
    """Parse the command line, plan, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="put the table between the marks in this file")
    parser.add_argument("--json", type=Path, help="write all plans here")
    parser.add_argument("--check", type=Path, help="fail when the table in this file is another one")
    args = parser.parse_args()
    rows = [row(preset, card, length) for preset in PRESETS for length in LENGTHS for card in CARDS]
    table = render(rows)
    print(table)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    if args.write:
        args.write.write_text(replaced(args.write.read_text(), table))
    if args.check and replaced(text := args.check.read_text(), table) != text:
        raise SystemExit(f"{args.check} holds another table: python scripts/memory_table.py --write {args.check}")


def row(preset: str, card: str, length: int) -> dict[str, Any]:
    """The plan of one cell."""
    found = find_preset(preset)
    assert found is not None
    spec = spec_from_config(found.config, preset)
    recipe = make_recipe({"model": preset, "gpu": card, "host_mem": HOST, "max_seq_len": length})
    plan = make_plan(spec, recipe, budget(recipe))
    return {
        "preset": preset,
        "card": card,
        "max_seq_len": length,
        "fits": plan.fits,
        "fit": plan.fit,
        "peak_bytes": plan.peak_bytes,
        "host_peak_bytes": plan.host_peak_bytes,
        "on_disk": plan.settings.on_disk,
        "tokens_per_second_estimate": plan.tokens_per_second_estimate,
    }


def budget(recipe: Any) -> MemoryBudget:
    """That of the named card."""
    return make_budget(recipe, "cpu", 0, HOST)


def render(rows: list[dict[str, Any]]) -> str:
    """A line a preset and length, a column a card."""
    head = ["model", "tokens", *(f"{size} GB ({card})" for card, size in CARDS.items())]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for start in range(0, len(rows), len(CARDS)):
        group = rows[start : start + len(CARDS)]
        cells = [group[0]["preset"], f"{group[0]['max_seq_len']:,}", *map(cell, group)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(plan: dict[str, Any]) -> str:
    """How it fits, device and host memory, estimated speed."""
    if not plan["fits"]:
        return "does not fit"
    device, host = (f"{plan[key] / 2**30:.1f}" for key in ("peak_bytes", "host_peak_bytes"))
    where = "stream, disk" if plan["on_disk"] else plan["fit"]
    return f"{where}, {device} + {host} GiB, ~{plan['tokens_per_second_estimate']:,.0f} tok/s"


def replaced(text: str, table: str) -> str:
    """``text`` with the table between the marks."""
    start, end = map(re.escape, MARKS)
    return re.sub(f"{start}.*{end}", lambda _: f"{MARKS[0]}\n{table}\n{MARKS[1]}", text, flags=re.S)


if __name__ == "__main__":
    main()
