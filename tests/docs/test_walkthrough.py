"""The notebook runs from top to bottom, in a process of its own, as Jupyter would run it."""

import json
import subprocess
import sys
from pathlib import Path

NOTEBOOK = Path(__file__).parents[2] / "docs" / "walkthrough.ipynb"


def test_every_cell_runs(tmp_path):
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 6 and not any(cell.get("outputs") for cell in cells)
    done = subprocess.run(
        [sys.executable, "-P", "-c", "\n".join(code)], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert "stream fits: True" in done.stdout and "share" in done.stdout
