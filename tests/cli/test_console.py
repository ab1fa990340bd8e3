"""What a run shows: a bar on a terminal, a few lines in a log, each at once and none beyond the width of a terminal."""

import io
import sys
from functools import partial
from itertools import count
from types import SimpleNamespace

import pytest
from tqdm import tqdm

from effitrain.cli.console import Console
from effitrain.train.hooks import StepRecord


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def streams(monkeypatch):
    """``streams(kind)``: stdout and stderr replaced by two of that kind."""

    def replace(kind):
        out, err = kind(), kind()
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        return out, err

    return replace


def train(steps, done=0):
    console = Console()
    for layer in range(3):
        console.loaded(f"model.layers.{layer}", 3)
    console.training(done, steps)
    for step in range(done + 1, steps + 1):
        console.step(StepRecord(step, 1.25, 1e-3, 0.5, 4096, 12345.6, 3 * 2**30))
    console.close()


@pytest.mark.parametrize("steps,done,lines", [(250, 0, 10), (250, 100, 6), (3, 0, 3), (12, 11, 1), (7, 7, 0)])
def test_a_log_gets_a_line_every_tenth_and_no_bar(streams, steps, done, lines):
    out, err = streams(io.StringIO)
    train(steps, done)
    told = out.getvalue().splitlines()
    assert len(told) == lines and not err.getvalue()
    if lines:
        assert told[-1] == f"Step {steps} of {steps}: loss 1.250, 12,346 tok/s, 3.0 GiB"


def test_a_log_says_how_long_is_left_at_the_pace_since_it_began(streams, monkeypatch):
    """A resumed run took other steps in another process, at another pace."""
    out, _ = streams(io.StringIO)
    seconds = count(100.0, 50.0)
    monkeypatch.setattr("effitrain.cli.console.monotonic", seconds.__next__)
    console = Console()
    console.training(10, 20)
    for step in range(11, 21):
        console.step(StepRecord(step, 1.25, 1e-3, 0.5, 4096, 12345.6, 0))
    ends = [line.partition("0 B")[2] for line in out.getvalue().splitlines()]
    assert ends == [", 3 min left", ", 2 min left", ", 2 min left", ", 50 s left", ""]  # a look at the clock, 50 s


@pytest.mark.parametrize(("parts", "lines"), [(82, 10), (4, 4)])
def test_building_a_store_is_told_as_sparsely(streams, parts, lines):
    out, err = streams(io.StringIO)
    console = Console()
    for done in range(1, parts + 1):
        console.stored(done, parts)
    told = out.getvalue().splitlines()
    assert len(told) == lines and told[-1] == f"Building the store: part {parts} of {parts}" and not err.getvalue()


def test_a_terminal_gets_one_bar_that_fits_it(streams, monkeypatch):
    monkeypatch.setattr("effitrain.cli.console.tqdm", partial(tqdm, ncols=80))
    out, err = streams(Terminal)
    train(250)
    shown = [part for part in err.getvalue().replace("\n", "\r").split("\r") if part.strip()]
    assert not out.getvalue() and all(len(part) <= 80 for part in shown)
    assert "250/250" in shown[-1] and "loss 1.250, 12,346 tok/s, 3.0 GiB" in shown[-1]


def test_notes_reach_a_pipe_at_once(streams):
    flushed = []
    pipe, _ = streams(io.StringIO)
    pipe.flush = lambda: flushed.append(pipe.getvalue())
    Console().evaluated("before", SimpleNamespace(loss=1.0, perplexity=2.718))
    assert flushed[-1:] == ["Evaluation loss before: 1.0000 (perplexity 2.72)\n"]


def test_notes_and_the_sample_are_as_wide_as_the_terminal(streams, monkeypatch):
    """No word is torn apart, for it may be a path; characters of the sample that take two cells count as two."""
    monkeypatch.setenv("COLUMNS", "40")
    out, _ = streams(io.StringIO)
    console, path = Console(), "/a/folder/" + 40 * "x"
    console.note(f"Going on from {path}, after step 3 of 7, with all that was there.")
    assert f"{path}," in out.getvalue().split()
    stats = SimpleNamespace(
        samples=1330, format="alpaca", template="plain", tokens=63160, trained_share=0.21, truncated=0, dropped=2000
    )
    console.data(
        SimpleNamespace(stats=stats, eval=range(66), preview="A long line " * 9 + "\n\n" + "宽" * 30 + "«end»")
    )
    lines = out.getvalue().splitlines()
    assert "Data: 1,330 samples (alpaca, template" in lines and "2,000 dropped" in out.getvalue()
    assert not [line for line in lines if (len(line) > 40 and path not in line) or line.endswith(" ")]
    assert "宽" * 20 in lines and "宽" * 10 + "«end»" in lines and lines[-3] == ""
