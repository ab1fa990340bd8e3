"""What a benchmark leaves: its figures, with the machine that they were measured on."""

import argparse
import json
import os
from datetime import date
from pathlib import Path
from typing import Any


def arguments(about: str | None) -> argparse.ArgumentParser:
    """A parser that prints ``about`` as it is written, with ``--out``."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the JSON here as well")
    return parser


def machine() -> dict[str, Any]:
    """Day, processor, threads, load of the last minute, versions that decide results; asked before measuring."""
    import torch

    from effitrain.report.files import versions

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return {
        "date": date.today().isoformat(),
        "cpu": next((line.partition(": ")[2] for line in lines if "model name" in line), "unknown"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "versions": versions(),
    }


def write(figures: dict[str, Any], out: Path | None) -> None:
    """Write ``figures`` to ``out`` as JSON, where it is named, and print them."""
    text = json.dumps(figures, indent=2)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n", encoding="utf-8")
    print(text)
