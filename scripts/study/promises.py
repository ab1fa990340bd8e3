"""What was promised and what says whether it is kept: a row names its source, and nobody types what came of it.

A source is a figure of a committed JSON, a long check of ``benchmarks/slow_checks.md``, something counted here and now,
a test of every CI run, or a card that was not at hand. All but the last two have a bound.
"""

import ast
import json
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SLOW_CHECKS = ROOT / "benchmarks/slow_checks.md"
SIGNS = {"at most": operator.le, "at least": operator.ge, "below": operator.lt, "exactly": operator.eq}
LEFT_OUT = {"slow", "gpu", "skip", "skipif"}  # marks of tests that CI does not run, or may not


@dataclass(frozen=True)
class Bound:
    """What a figure must be: ``sign`` is one of ``SIGNS``; ``form`` prints it and the figure alike."""

    sign: str
    value: float
    form: str

    def met(self, found: float) -> bool:
        """Whether ``found`` keeps to it, unrounded."""
        return SIGNS[self.sign](found, self.value)

    def __str__(self) -> str:
        return f"{self.sign} {self.form.format(self.value)}"


def at_most(value: float, form: str = "{:g}") -> Bound:
    """No more than ``value``."""
    return Bound("at most", value, form)


def at_least(value: float, form: str = "{:g}") -> Bound:
    """No less than ``value``."""
    return Bound("at least", value, form)


def below(value: float, form: str = "{:g}") -> Bound:
    """Less than ``value``."""
    return Bound("below", value, form)


def exactly(value: float, form: str = "{:g}") -> Bound:
    """``value`` and nothing else."""
    return Bound("exactly", value, form)


@dataclass(frozen=True)
class Found:
    """What a source says: the bound, the figure, whether it is met (None without a card), what makes it, and when."""

    bound: str
    measured: str
    met: bool | None
    made_by: str
    when: str

    @property
    def verdict(self) -> str:
        """In a cell of the table."""
        return {True: "met", False: "**not met**", None: "needs a card"}[self.met]


class Source:
    """Where the answer to a promise stands."""

    def found(self) -> Found:
        """What it says now."""
        raise NotImplementedError


@dataclass(frozen=True)
class Figure(Source):
    """A figure of a committed JSON, which ``pick`` takes out of it; ``command`` writes the JSON."""

    bound: Bound
    file: str
    command: str
    pick: Callable[[Any], float]

    def found(self) -> Found:
        """With the day and the machine that the JSON names."""
        known = read(self.file)
        value = self.pick(known)
        text = self.bound.form.format(value)
        return Found(
            str(self.bound), text, self.bound.met(value), f"`{self.command}`", when(known.get("machine", known))
        )


@dataclass(frozen=True)
class Slow(Source):
    """A long check that CI leaves out, by its name in ``benchmarks/slow_checks.md``."""

    bound: Bound
    name: str

    def found(self) -> Found:
        """With the command, day and machine that stand there."""
        entry = slow_checks()[self.name]
        value = float(entry["figure"])
        text = self.bound.form.format(value)
        return Found(
            str(self.bound), text, self.bound.met(value), entry["command"], f"{entry['date']}, {entry['machine']}"
        )


@dataclass(frozen=True)
class Counted(Source):
    """What is counted anew whenever the page is made, and ``command`` shows too."""

    bound: Bound
    command: str
    count: Callable[[], float]

    def found(self) -> Found:
        """Counted now."""
        value = self.count()
        return Found(
            str(self.bound), self.bound.form.format(value), self.bound.met(value), f"`{self.command}`", "every CI run"
        )


@dataclass(frozen=True)
class Tested(Source):
    """Tests that hold the promise on every CI run, as ``path::name`` below ``tests``; ``bound`` is what they check."""

    bound: str
    tests: tuple[str, ...]

    def found(self) -> Found:
        """Met, since CI fails otherwise; an error where one of the tests is not there or is left out of CI."""
        for test in self.tests:
            must_run(test)
        return Found(self.bound, "by test", True, ", ".join(f"`{test}`" for test in self.tests), "every CI run")


@dataclass(frozen=True)
class OnCard(Source):
    """What only a card can tell."""

    bound: str
    command: str

    def found(self) -> Found:
        """Nothing yet."""
        return Found(self.bound, "", None, f"`{self.command}`", "")


@dataclass(frozen=True)
class Row:
    """A promise in one line, what says whether it is kept, and why where it is known not to be."""

    promise: str
    source: Source
    why: str = ""

    @cached_property
    def found(self) -> Found:
        """What its source says, asked once."""
        return self.source.found()

    def because(self, why: str) -> "Row":
        """The same with a reason."""
        return replace(self, why=why)


def table(rows: Sequence[Row]) -> str:
    """Rows of one part, as Markdown."""
    lines = ["| promise | bound | measured | | made by | when, where |", "|---|---|---|---|---|---|"]
    for row in rows:
        found = row.found
        cells = (row.promise, found.bound, found.measured, found.verdict, found.made_by, found.when)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(parts: Mapping[str, Sequence[Row]]) -> str:
    """How many promises of each part are met, and those that are not."""
    lines = ["| part | promises | met | not met | need a card |", "|---|---:|---:|---:|---:|"]
    for name, rows in parts.items():
        met = [row.found.met for row in rows]
        lines.append(f"| {name} | {len(met)} | {met.count(True)} | {met.count(False)} | {met.count(None)} |")
    return "\n".join([*lines, "", "Not met:", "", *missed(parts)])


def missed(parts: Mapping[str, Sequence[Row]]) -> list[str]:
    """A line for every promise that is not met."""
    return [
        f"- {row.promise}: {row.found.measured} instead of {row.found.bound}. {row.why}".rstrip()
        for rows in parts.values()
        for row in rows
        if row.found.met is False
    ]


@cache
def read(file: str) -> Any:
    """A committed JSON."""
    return json.loads((ROOT / file).read_text(encoding="utf-8"))


def when(machine: dict[str, Any]) -> str:
    """Day and processor of what a benchmark or study says about its machine."""
    cpu = machine.get("cpu", "unknown processor").replace("(R)", "").replace(" Processor", "")
    return f"{machine.get('date', 'day not kept')}, {machine.get('cores', '?')} cores of {cpu}"


@cache
def slow_checks() -> dict[str, dict[str, str]]:
    """The entries of ``benchmarks/slow_checks.md`` by name.

    Raises:
        ValueError: a name stands there twice, or a figure is no number.
    """
    rows = [
        line for line in SLOW_CHECKS.read_text(encoding="utf-8").split("\n\n## ")[0].splitlines() if line[:1] == "|"
    ]
    head, _, *body = ([cell.strip() for cell in row.strip("|").split(" | ")] for row in rows)
    entries = [dict(zip(head, cells, strict=True)) for cells in body]
    for entry in entries:
        float(entry["figure"])
    by_name = {entry["name"]: entry for entry in entries}
    if len(by_name) != len(entries):
        raise ValueError(f"{SLOW_CHECKS} names a check twice.")
    return by_name


def must_run(test: str) -> None:
    """See that CI runs ``test``, which is ``path::name`` below ``tests``.

    Raises:
        ValueError: there is no such test, or a mark keeps it from CI.
    """
    path, _, name = test.partition("::")
    tree = _tree(path)
    function = next((node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name), None)
    if function is None:
        raise ValueError(f"tests/{path} has no test {name}")
    marks = {*_marks(function.decorator_list), *_marks([node.value for node in tree.body if _is_pytestmark(node)])}
    if marks & LEFT_OUT:
        raise ValueError(f"{test} is marked {', '.join(sorted(marks & LEFT_OUT))}: CI does not run it")


def cases(path: str, *names: str) -> int:
    """How many cases hold the dictionaries ``names`` that the tests of a file below ``tests`` are parametrised by."""
    return sum(len(_dictionary(path, name).keys) for name in names)


def _dictionary(path: str, name: str) -> ast.Dict:
    for node in _tree(path).body:
        targets = node.targets if isinstance(node, ast.Assign) else ()
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            assert isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
            return node.value
    raise ValueError(f"tests/{path} has no {name}")


@cache
def _tree(path: str) -> ast.Module:
    file = ROOT / "tests" / path
    if not file.exists():
        raise ValueError(f"there is no tests/{path}")
    return ast.parse(file.read_text(encoding="utf-8"))


def _is_pytestmark(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "pytestmark" for target in node.targets)


def _marks(expressions: Sequence[ast.AST]) -> Iterator[str]:
    """Marks of a whole test: those on single parameters stand inside ``parametrize`` and are none."""
    for expression in expressions:
        while isinstance(expression, ast.Call):
            expression = expression.func
        if isinstance(expression, ast.List):
            yield from _marks(expression.elts)
        elif isinstance(expression, ast.Attribute):
            yield expression.attr
