"""What the end-to-end tests share: instructions to learn, the command line in this process, digests of folders."""

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest


class Answer(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session", autouse=True)
def _environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache for what module fixtures run, before any test has its own; and no variable left that the command sets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        yield


@pytest.fixture(scope="session")
def effitrain() -> Callable[..., Answer]:
    """``effitrain(*arguments)``: the command line, in this process for speed."""
    from effitrain.cli.main import main

    def call(*arguments: object) -> Answer:
        out, err = io.StringIO(), io.StringIO()
        with pytest.raises(SystemExit) as end, redirect_stdout(out), redirect_stderr(err):
            main([str(argument) for argument in arguments])
        assert isinstance(end.value.code, int)
        return Answer(end.value.code, out.getvalue(), err.getvalue())

    return call


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
