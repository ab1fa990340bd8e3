"""The results page, README's tables and their sources: made anew they are what is committed."""

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch):
    """``script(name)``: a script, or a module of what they share, imported for one test."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    yield importlib.import_module
    for name in [name for name in sys.modules if name.partition(".")[0] in ("study", "results", "memory_table")]:
        del sys.modules[name]


def test_the_pages_are_what_the_script_makes(script):
    results = script("results")
    assert (ROOT / "docs/results.md").read_text() == results.page(), "python scripts/results.py --write"
    readme = (ROOT / "README.md").read_text()
    assert f"<!-- results -->\n{results.summary(results.PARTS)}\n<!-- /results -->" in readme
    bench = results.bench(json.loads((ROOT / "benchmarks/cpu.json").read_text()))
    assert f"<!-- bench -->\n{bench}\n<!-- /bench -->" in readme


def test_nothing_falls_short_without_a_reason(script):
    """So that what was met is not lost when something is measured anew."""
    rows = [row for part in script("results").PARTS.values() for row in part]
    assert not [row.promise for row in rows if row.found.met is False and not row.why]


def test_the_memory_table_is_that_of_its_script(script):
    """README shows the plans of the JSON; one of each model is made anew, with lengths and cards in turn."""
    made, rows = script("memory_table"), json.loads((ROOT / "benchmarks/memory_table.json").read_text())
    readme = (ROOT / "README.md").read_text()
    assert made.replaced(readme, made.render(rows)) == readme, "python scripts/memory_table.py --write README.md"
    lines = [(preset, length) for preset in made.PRESETS for length in made.LENGTHS]
    assert [(row["preset"], row["max_seq_len"]) for row in rows] == [line for line in lines for _ in made.CARDS]
    for number in (1, 3, 8, 10, 14):
        (preset, length), card = lines[number], number % len(made.CARDS)
        assert made.row(preset, list(made.CARDS)[card], length) == rows[number * len(made.CARDS) + card]


def test_a_bound_is_met_by_the_figure_and_not_by_how_it_is_printed(script):
    of = script("study.promises")
    assert of.at_least(2, "{:.2f}x").met(2) and not of.at_least(2, "{:.2f}x").met(1.999)
    assert of.at_most(2).met(2) and not of.at_most(2).met(2.001)
    assert of.below(1).met(0.99) and not of.below(1).met(1)
    assert of.exactly(3).met(3) and not of.exactly(3).met(2)
    assert str(of.at_most(1.15, "{:.2f}x")) == "at most 1.15x"


def test_each_source_says_what_it_found(script, monkeypatch):
    of = script("study.promises")
    monkeypatch.setattr(of, "read", lambda file: {"a": 3, "machine": {"date": "2026-01-02", "cpu": "X", "cores": 4}})
    monkeypatch.setattr(
        of, "slow_checks", lambda: {"b": {"figure": "0.5", "command": "c", "date": "d", "machine": "m"}}
    )
    test = "scripts/test_results.py::test_each_source_says_what_it_found"
    sources = [
        of.Figure(of.at_most(2), "f.json", "make", lambda known: known["a"]),
        of.Slow(of.at_least(0.25, "{:.0%}"), "b"),
        of.Counted(of.exactly(1), "count", lambda: 1),
        of.Tested("1e-4", (test,)),
        of.OnCard("1x", "bench"),
    ]
    assert [source.found() for source in sources] == [
        of.Found("at most 2", "3", False, "`make`", "2026-01-02, 4 cores of X"),
        of.Found("at least 25%", "50%", True, "c", "d, m"),
        of.Found("exactly 1", "1", True, "`count`", "every CI run"),
        of.Found("1e-4", "by test", True, f"`{test}`", "every CI run"),
        of.Found("1x", "", None, "`bench`", ""),
    ]
    parts = {"One": [of.Row("is small", sources[0]).because("It is large."), of.Row("waits", sources[4])]}
    assert "| One | 2 | 0 | 1 | 1 |" in of.summary(parts)
    assert of.missed(parts) == ["- is small: 3 instead of at most 2. It is large."]
    assert "| is small | at most 2 | 3 | **not met** | `make` |" in of.table(parts["One"])


@pytest.mark.parametrize(
    ("rows", "wrong"),
    [
        ("| a | 1 | c | w | d | m |\n| a | 2 | c | w | d | m |", "twice"),
        ("| a | many | c | w | d | m |", "many"),
        ("| a | 1 | c | w | d |", "argument"),
    ],
)
def test_long_checks_that_cannot_be_read(script, monkeypatch, tmp_path, rows, wrong):
    of = script("study.promises")
    page = tmp_path / "slow_checks.md"
    page.write_text(
        f"# Checks\n\n| name | figure | command | what | date | machine |\n|---|---|---|---|---|---|\n{rows}\n"
    )
    monkeypatch.setattr(of, "SLOW_CHECKS", page)
    with pytest.raises(ValueError, match=wrong):
        of.slow_checks()


def test_cases_are_counted_in_the_source(script):
    """The number is that of what pytest collects, which would take seconds to ask for."""
    of = script("study.promises")
    assert of.cases("cli/test_bad_inputs.py", "TOO_SMALL") == 4
    with pytest.raises(ValueError, match="has no NOTHING"):
        of.cases("cli/test_bad_inputs.py", "NOTHING")
