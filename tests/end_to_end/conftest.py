"""What the end-to-end tests share: instructions to learn, and digests of folders."""

import hashlib
import json
from collections.abc import Callable
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


@pytest.fixture(scope="session")
def digests() -> Callable[[Path], dict[str, tuple[str, int]]]:
    """``digests(folder)``: hash and time of change of every file below it, by relative path."""

    def of(folder: Path) -> dict[str, tuple[str, int]]:
        files = (path for path in sorted(folder.rglob("*")) if path.is_file())
        return {
            str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
            for path in files
        }

    return of
