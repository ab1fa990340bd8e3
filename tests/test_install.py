"""The package as it is installed where the install is not editable."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = [ROOT / "effitrain", ROOT / "kernels", ROOT / "pruning"]


def test_what_is_installed_is_whole(tmp_path):
    """Rooms behind links, presets, built-in data and tiles of kernels too."""
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", tmp_path, "build", "-b", tmp_path / "build"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = {path for room in ROOMS for path in room.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    expected = {Path("effitrain", *path.relative_to(ROOT).parts[path.is_relative_to(ROOMS[0]) :]) for path in files}
    built = tmp_path / "build/lib"
    assert {path.relative_to(built) for path in built.rglob("*") if path.is_file()} == expected
