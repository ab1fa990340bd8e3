"""Every flag of every verb does something that can be seen, or is refused with a reason.

The flags are those that the parser has. Each has a case in ``flag_cases.py``: the verb is run with it and without it,
in this process and on a tiny model, and what can be seen must differ. A flag without a case fails, and so does a case
without its flag.
"""

import hashlib
import importlib
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace

import click
import pytest
import yaml

from effitrain.cli.main import VERBS

from .flag_cases import BASE, CASES, MEMORY, PRUNED, Case


def words(text: str) -> list[str]:
    return shlex.split(text)


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every verb that takes flags, by its words."""
    for verb in VERBS:
        command = importlib.import_module(f"effitrain.cli.{verb}").command
        if isinstance(command, click.Group):
            yield from ((f"{verb} {name}", one) for name, one in command.commands.items())
        else:
            yield verb, command


def flags_of(command: click.Command) -> list[str]:
    return [option.opts[0] for option in command.params if isinstance(option, click.Option)]


SWITCHES = {verb: {o.opts[0]: o.secondary_opts for o in command.params} for verb, command in commands()}


def test_every_flag_of_every_verb_has_a_case_and_no_case_is_without_its_flag():
    assert {verb: sorted(flags_of(command)) for verb, command in commands()} == {
        verb: sorted(cases) for verb, cases in CASES.items()
    }


IGNORED = ("recipe.yaml", "run.json", "report.json", "report.html", "loss.png", ".stale")  # hold the flags, or times
LISTED = ("checkpoints", "stores")  # folders whose names are looked at, not what is in them


class Workplace:
    """Runs commands each in a new folder, beside the files of ``stock``; a command's view is taken once."""

    def __init__(self, call, root: Path, stock: dict[str, Path]):
        self.call, self.root, self.stock = call, root, stock
        self.views: dict[str, dict] = {}

    def see(self, verb: str, *parts: str) -> dict:
        """What can be seen of a command: how it ends, what it prints, what it leaves."""
        line = " ".join([verb, *filter(None, parts)])
        if line not in self.views:
            self.views[line] = self._see(line)
        return self.views[line]

    def _see(self, line: str) -> dict:
        place = Path(mkdtemp(dir=self.root))
        for name, path in self.stock.items():
            (place / name).symlink_to(path)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(place)
            patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
            answer = self.call(*words(line))
        printed = _kind(answer.out) if line.startswith("run") and "--dry-run" not in line else answer.out
        return {"code": answer.code, "said": answer.err if answer.code else "", "printed": printed, **_left(place)}


def _kind(out: str) -> str:
    """Of output with times in it."""
    return "JSON" if out.startswith("{") else "text" if out else ""


def _left(place: Path) -> dict[str, object]:
    """The files below a folder, and what is in them."""
    found: dict[str, object] = {}
    for path in sorted(path for path in place.rglob("*") if path.is_file() and not path.is_symlink()):
        name = str(path.relative_to(place))
        if ("cache/" in name and "stores" not in name) or path.name in IGNORED:
            continue
        if set(LISTED) & {*path.parts}:
            found[name] = None
        elif path.name == "metrics.jsonl":
            found[name] = [(step["loss"], step["lr"]) for step in map(json.loads, path.read_text().splitlines())]
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    evals = [json.loads(path.read_text())["evals"] for path in place.rglob("run.json")]
    return {"files": found, "evals": evals}


@pytest.fixture(scope="module")
def workplace(effitrain, tiny_model, tmp_path_factory):
    root = tmp_path_factory.mktemp("flags")
    for name, count in (("rows", 12), ("other", 9)):
        rows = (
            {"prompt": f"Say {name} " * (2 + i % 3), "completion": f"{i} " * (i + 9), "text": f"text {i} " * 9}
            for i in range(count)
        )
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "recipe.yaml").write_text(
        yaml.safe_dump({"output_dir": "elsewhere", "seed": 3, "lr": 3e-3, "max_seq_len": 48})
    )
    stock = {name: root / name for name in ("rows.jsonl", "other.jsonl", "recipe.yaml")}
    stock |= {"model": tiny_model(), "second": tiny_model("qwen2", layers=3, hidden=48)}
    place = Workplace(effitrain, root / "places", stock)
    place.root.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("effitrain.report.files.loss_png", lambda *drawn: b"")  # takes longer than the run
        patch.setattr("effitrain.training.choose", lambda tokens: ())  # and so do answers
        patch.setattr("effitrain.evals.bench_step.in_processes", _timed)  # minutes
        patch.setitem(sys.modules, "wandb", SimpleNamespace(init=_tracked))
        patch.setattr("torch.cuda.is_available", lambda: False)
        for name, flags in (
            ("finished", "--lr 0.01 --max-steps 2"),
            ("finished-too", "--lr 0.01 --max-steps 1 --lora-r 2"),
            ("finished-small", f"{PRUNED} --max-steps 1"),
        ):
            answer = effitrain("run", *words(flags), *_absolute(BASE["run"], stock), "-o", root / name)
            assert answer.code == 0, answer.err
            stock[name] = root / name
        yield place


def _tracked(**where: object) -> SimpleNamespace:
    """In place of a tracker: a file of the steps it is sent."""
    return SimpleNamespace(log=lambda values, step: Path(f"sent-{step}.json").write_text(json.dumps(sorted(values))))


def _timed(model: str, sizes: tuple[int, ...], where: str, tell: Callable[[str], None]) -> Iterator[dict]:
    """In place of processes that train: what they were asked for, as the name of one."""
    figures = {"tokens_per_second": 1.0, "peak_bytes": 1, "losses": [1.0], "same_loss": True}
    yield {"contender": f"{model} {sizes} {where}", **figures}


def _absolute(line: str, stock: dict[str, Path]) -> list[str]:
    return [str(stock.get(word, word)) for word in words(line)]


@pytest.mark.parametrize("verb", BASE)
def test_the_same_command_shows_the_same(workplace, verb):
    one = workplace.see(verb, BASE[verb])
    assert workplace.see(verb, BASE[verb], " ") == one
    assert one["code"] == 0 or verb == "bench kernels", one["said"]


ALL = [(verb, flag) for verb, cases in CASES.items() for flag in cases]


@pytest.mark.parametrize(("verb", "flag"), ALL, ids=lambda value: value.strip("-"))
def test_the_flag_shows(workplace, verb, flag):
    case, base = CASES[verb][flag], BASE[verb].replace(flag, "") if flag == "--json" else BASE[verb]
    check(workplace, case, verb, f"{base} --dry-run --json" if case.dry else base, flag)


@pytest.mark.slow
@pytest.mark.parametrize("flag", [flag for flag in MEMORY if flag != "--prefer"])
def test_what_comes_of_the_plan_shows(workplace, flag):
    refused = {"--gpu": "plans for a card that is not here", "--small-model": "nowhere", "--host-mem": "The host needs"}
    check(workplace, MEMORY[flag]._replace(said=refused.get(flag, "")), "run", BASE["run"], flag)


def check(workplace: Workplace, case: Case, verb: str, base: str, flag: str) -> None:
    before, after = workplace.see(verb, base, case.beside), workplace.see(verb, base, case.beside, flag, case.given)
    if case.said:
        assert after["code"] in (2, 3) and case.said in after["said"] + after["printed"]
        assert case.said not in before["said"] + before["printed"] or verb == "bench kernels"
    elif case.nothing:
        assert after == before and after["code"] == 0
    else:
        assert before["code"] == after["code"] == 0, (before["said"], after["said"])
        assert after != before


PAIRS = [
    pytest.param(verb, flag, SWITCHES[verb][flag][0], marks=[pytest.mark.slow] if verb == "run" else [])
    for verb, flag in ALL
    if SWITCHES[verb][flag]
]


@pytest.mark.parametrize(("verb", "on", "off"), PAIRS)
def test_what_is_turned_on_can_be_turned_off(workplace, verb, on, off):
    beside = CASES[verb][on].beside
    assert workplace.see(verb, BASE[verb], beside, on, off) == workplace.see(verb, BASE[verb], beside)
