"""Every command and every Python example of the guide, and of long_context.md, runs and prints what the page shows.

A page is run from top to bottom in one folder. ``sh`` and ``python`` blocks are executed; ``sh exit=2`` must end with
that code. A ``text`` block is what the block before it prints: its lines appear in that order, any number may stand for
any other, and ``...`` for anything. ``sh not-run`` and ``python not-run`` need what is not here; the page says what.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

GUIDE = Path(__file__).parents[2] / "docs" / "guide"
PAGES = [*sorted({*GUIDE.glob("*.md")} - {GUIDE / "README.md"}), GUIDE.parent / "long_context.md"]
_BLOCK = re.compile(r"^```(?P<info>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_NUMBER = r"\d[\d,]*(?:\.\d+)?(?:e-?\d+)?"
_LOOSE = re.compile(rf"({_NUMBER}|\.\.\.)")


class Block(NamedTuple):
    """A fenced block: its language, the words after it, its text."""

    kind: str
    words: tuple[str, ...]
    text: str


def blocks(page: str) -> Iterator[Block]:
    for match in _BLOCK.finditer(page):
        kind, *words = match["info"].split() or [""]
        yield Block(kind, tuple(words), match["text"])


def pattern(shown: str) -> re.Pattern[str]:
    """What a ``text`` block stands for, in output whose white space is single spaces."""
    lines = (" ".join(line.split()) for line in shown.strip().splitlines())
    return re.compile(".*?".join("".join(_any(piece) for piece in _LOOSE.split(line)) for line in lines))


def _any(piece: str) -> str:
    if piece == "...":
        return ".*?"
    return _NUMBER if _LOOSE.fullmatch(piece) else re.escape(piece)


def shows(said: str, shown: str) -> bool:
    return bool(pattern(shown).search(" ".join(said.split())))


@pytest.fixture
def execute(tmp_path):
    """``execute(block)``: its output; fails when it ends otherwise than it says."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, command in (("effitrain", "-m effitrain"), ("python", "")):
        (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" -P {command} "$@"\n')
        (tools / name).chmod(0o755)
    home = tmp_path / "home"
    home.mkdir()
    env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "COLUMNS": "80"}

    def run(block: Block) -> str:
        command = ["bash", "-e", "-c", block.text] if block.kind == "sh" else [str(tools / "python"), "-c", block.text]
        done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, timeout=300)
        wanted = next((int(word.removeprefix("exit=")) for word in block.words if word.startswith("exit=")), 0)
        assert done.returncode == wanted, f"{block.text}\nended with {done.returncode}:\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    return run


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_runs_as_it_reads(page, execute):
    said = ""
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.kind in ("sh", "python") and "not-run" not in block.words:
            said = execute(block)
        elif block.kind == "text":
            assert shows(said, block.text), f"{page.name} shows\n{block.text}\nand the command prints\n{said}"


def test_the_guide_lists_its_pages():
    listed = re.findall(r"\]\(([^)]+)\)", (GUIDE / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(page.name for page in GUIDE.glob("*.md") if page.name != "README.md")


def test_a_page_that_shows_something_else_fails():
    assert shows("Loss 0.5 is good after 12 steps\nand more\ndone.", "Loss 1.25 ... after 3 steps\ndone")
    assert not shows("Loss 0.5\ndone", "done\nLoss 1.25")
    assert not shows("Loss 0.5 (high)", "Loss 1.25 (low)")
