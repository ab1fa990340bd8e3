"""The short forms of the pruning studies: they run, and their figures go the way they should."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


def study(name: str, data: Path, out: Path) -> tuple[dict, str]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", SCRIPTS / f"{name}.py", "-o", out, "--quick"],
        env={**os.environ, "EFFITRAIN_DATA": str(data), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (out / f"{name}.png").stat().st_size > 1000
    return json.loads((out / f"{name}.json").read_text()), done.stdout


@pytest.mark.slow
def test_loram(data_dir, tmp_path):
    """After a few steps alignment already brings more of the gain to the full model."""
    found, printed = study("study_loram", data_dir, tmp_path)
    plain, aligned = found["runs"]
    assert (plain["align"], aligned["align"]) == ("none", "lsq")
    assert aligned["small_before"] < plain["small_before"] and aligned["recovered"] < found["base"]
    assert printed.count("| ffn | wanda |") == 2


@pytest.mark.slow
def test_loraprune(data_dir, tmp_path):
    found, printed = study("study_loraprune", data_dir, tmp_path)
    assert [run["method"] for run in found["runs"]] == ["loraprune", "magnitude", "wanda", "taylor"]
    assert all(run["perplexity"] > found["base"] for run in found["runs"]) and printed.count("| 0.5 |") == 4
