"""What the tests of the command line share: a finished run, and a place for bad input."""

import importlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from effitrain.cli.main import VERBS

FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
PROGRESS = re.compile(r"(^|\r)(loading|training|merging):[^\r\n]*|\r|\x1b\[A")


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve rows of different lengths, as prompt and completion."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = (json.dumps({"prompt": f"Say {i}", "completion": f"{i} " * (i + 1)}) for i in range(12))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def asked(tiny_model: Callable[..., Path], rows: Path) -> dict[str, object]:
    """Flags of a run of two steps."""
    return {
        "--model": tiny_model(), "--dataset": rows, "--quant": "none", "--lora-r": 4, "--max-seq-len": 48,
        "--batch-size": 4, "--grad-accum": 1, "--max-steps": 2, "--lr": 1e-2,
    }  # fmt: skip


@pytest.fixture(scope="session")
def finished(effitrain: Callable[..., Any], asked: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that run, finished; do not change it."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    answer = effitrain("run", *(part for pair in asked.items() for part in pair), "-o", folder)
    assert answer.code == 0, answer.err
    return folder


@dataclass(frozen=True)
class Place:
    """Where a case makes its bad input, with good ones beside it."""

    root: Path
    asked: Mapping[str, object]
    finished: Path

    def run(self, verb: str = "run", **flags: object) -> list[object]:
        """The command of a run that would go well but for ``flags``; None leaves one out."""
        changed = {f"--{name.replace('_', '-')}": value for name, value in flags.items()}
        kept = {**self.asked, "-o": self.root / "out", **changed}
        return [verb, *(part for pair in kept.items() if pair[1] is not None for part in pair)]

    def on(self, content: str | bytes, name: str = "rows.jsonl", **flags: object) -> list[object]:
        """A run on a data file with this content."""
        return self.run(dataset=self.file(name, content), **flags)

    def file(self, name: str, content: str | bytes) -> Path:
        """A new file."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def model(self, *without: str, **config: Any) -> Path:
        """A copy of the model, without some files, with another config."""
        folder = self.root / "model"
        shutil.copytree(str(self.asked["--model"]), folder, ignore=shutil.ignore_patterns(*without))
        if config:
            path = folder / "config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        return folder

    def weights(self, change: Callable[[bytes], bytes]) -> Path:
        """A copy of the model whose weights file is changed."""
        path = self.model() / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))
        return path.parent

    def adapter(self, **config: Any) -> Path:
        """A copy of the finished run's adapter with another config."""
        folder = self.root / "adapter"
        shutil.copytree(self.finished / "adapter", folder)
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        return folder

    def with_adapter(self, verb: str, adapter: Path, *more: object) -> list[object]:
        """``eval``, ``chat`` or ``export`` of the model with an adapter."""
        return [verb, "--model", self.asked["--model"], "--adapter", adapter, *more]


def foreign_flags(message: str, arguments: list[object]) -> list[str]:
    """Flags that a message names, and that neither its verb has, nor another one which it names in the same line."""
    typed = {str(argument) for argument in arguments}
    return [
        flag
        for line in message.splitlines()
        for flag in FLAG.findall(line)
        if flag not in {*typed, *flags_of(str(arguments[0]), *re.findall(r"effitrain (\w+)", line))}
    ]


def flags_of(*verbs: str) -> set[str]:
    """Every flag of some verbs."""
    commands = [importlib.import_module(f"effitrain.cli.{verb}").command for verb in verbs if verb in VERBS]
    return {"--help", *(name for command in commands for option in command.params for name in option.opts)}


@pytest.fixture
def place(tmp_path: Path, asked: dict[str, object], finished: Path) -> Place:
    """A new place."""
    return Place(tmp_path, asked, finished)


@pytest.fixture
def refused(effitrain: Callable[..., Any], place: Place, digests: Callable[..., Any]) -> Callable[..., Any]:
    """``refused(arguments, words, code=2)``: the command ends in one message with all of ``words`` in it, and all that
    was there is unchanged; no result is written.
    """

    def check(arguments: list[object], words: tuple[str, ...], code: int = 2) -> Any:
        watched = (place.root, place.finished, Path(str(place.asked["--model"])))
        before = digests(*watched)
        answer = effitrain(*arguments)
        assert answer.code == code, answer
        assert "Traceback" not in answer.out + answer.err
        message = PROGRESS.sub("", answer.err).strip()
        assert message.startswith("effitrain: ") and message.count("effitrain: ") == 1, answer.err
        assert not foreign_flags(message, arguments), f"{foreign_flags(message, arguments)} are not for this verb"
        assert len(message) < 1500 and len(message.splitlines()) < 12, message
        absent = [word for word in words if word.casefold() not in message.casefold()]
        assert not absent, f"{absent} not in: {message}"
        after = digests(*watched)
        assert before.items() <= after.items(), "something that was there has changed"
        made = [Path(path).relative_to(place.root).parts for path in after.keys() - before.keys()]
        assert not [parts for parts in made if parts[0] != "out" or {"adapter", "report.json", "model"} & {*parts}]
        return answer

    return check
