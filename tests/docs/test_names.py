"""The names in README.md and CONTRIBUTING.md: files, commands, flags and identifiers exist, and the reading order leads
from the command to the training step.
"""

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest

from effitrain.cli.main import VERBS

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", "docs/own_adapter.md"]
WRITTEN = ("out/", "my.jsonl", "test.jsonl", "adapters/gated.py")  # by a run, or by the reader
FILE = re.compile(r"[\w.*-]+(/[\w.*-]+)*/?")
ENDINGS = (".py", ".md", ".sh", ".toml", ".txt", "/")


def spans(page: str) -> list[str]:
    """What stands between backticks, outside of blocks."""
    prose = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def commands(page: str) -> Iterator[list[str]]:
    """Every effitrain command of a page, in blocks and between backticks."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    for line in [*(line.split("#")[0] for line in lines if line.startswith("    ")), *spans(page)]:
        if found := re.match(r"\s*(?:\S*/)?effitrain( .*)", line):
            yield shlex.split(found[1])


def option_names(verb: str) -> set[str]:
    command = importlib.import_module(f"effitrain.cli.{verb}").command
    every = [command, *(command.commands.values() if isinstance(command, click.Group) else [])]
    return {"--help", *(name for one in every for o in one.params for name in (*o.opts, *o.secondary_opts))}


@cache
def sources() -> str:
    folders = ("effitrain", "kernels", "pruning", "tests", "scripts")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.[ps][yh]") if path != Path(__file__)]
    return "\n".join(path.read_text(encoding="utf-8") for path in [*files, ROOT / "setup.py"])


@pytest.mark.parametrize("page", PAGES)
def test_the_files_are_there(page):
    named = [span for span in spans(page) if FILE.fullmatch(span) and span.endswith(ENDINGS)]
    files = [name for name in named if not name.startswith(WRITTEN) and "/" in name.rstrip("/")]
    bare = [name for name in named if "/" not in name.rstrip("/") and not name.startswith(WRITTEN)]
    absent = [name for name in files if not any([*ROOT.glob(name), *(ROOT / "effitrain").glob(name)])]
    lost = [name for name in bare if not any((ROOT / "effitrain").rglob(name)) and not any(ROOT.glob(name))]
    assert named and not absent + lost


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_and_flags_are_there(page):
    for verb, *rest in commands(page):
        assert verb in VERBS or verb == "VERB" or verb.startswith("-"), (verb, rest)
        unknown = [word for word in rest if word.startswith("-") and word.split("=")[0] not in option_names(verb)]
        assert not unknown, (verb, unknown)
    every = set().union(*map(option_names, VERBS))
    named = {word for span in spans(page) if span.startswith("--") for word in re.findall(r"--[a-z][a-z0-9-]*", span)}
    assert not named - every - {"--no-packing", "--import-mode", "--learning-rate"}  # the last is another tool's


@pytest.mark.parametrize("page", PAGES)
def test_the_identifiers_are_in_the_source(page):
    named = (re.fullmatch(r"([A-Za-z_][\w.]*)(\(.*\))?", span) for span in spans(page))
    names = {found[1].split(".")[-1] for found in named if found and not found[1].endswith(ENDINGS)}
    assert not [name for name in sorted(names) if not re.search(rf"\b{name}\b", sources())]


def test_three_files_lead_from_the_command_to_the_training_step():
    files = ["effitrain/cli/run.py", "effitrain/api.py", "effitrain/train/loop.py"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    places = [text.index(f"`{file}`", text.index("How to read the code")) for file in files]
    assert places == sorted(places)
    assert "api.run(" in (ROOT / files[0]).read_text(encoding="utf-8")
    functions = {node.name: node for node in ast.walk(_tree(files[1])) if isinstance(node, ast.FunctionDef)}
    assert "``train`` in ``train/loop.py``" in str(ast.get_docstring(functions["run"]))
    assert calls("effitrain/api.py", "carry_out") and calls("effitrain/carry_out.py", "train_model")
    assert calls("effitrain/training.py", "train")
    assert "train" in {node.name for node in _tree(files[2]).body if isinstance(node, ast.FunctionDef)}


def calls(file: str, name: str) -> bool:
    """Whether a function of this name is called in ``file``."""
    return name in {getattr(node.func, "id", "") for node in ast.walk(_tree(file)) if isinstance(node, ast.Call)}


def _tree(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))
