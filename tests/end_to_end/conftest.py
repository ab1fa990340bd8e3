"""What the end-to-end tests share: instructions to learn."""

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def counting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 alpaca rows of different lengths that a tiny model can begin to learn in a few steps."""
    rows = [
        {"instruction": f"Count from {i}", "input": "by one" * (i % 3), "output": " ".join(map(str, range(i, i + 9)))}
        for i in range(40)
    ]
    path = tmp_path_factory.mktemp("data") / "counting.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path
