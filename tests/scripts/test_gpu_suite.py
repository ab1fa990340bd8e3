"""The GPU suite rehearsed on a CPU: its runs and what it makes of them, on the built-in model's shape."""

import importlib.util
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from effitrain.model.load import load_model

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_suite.py"


def load(name):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, SCRIPT.with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def suite():
    yield load("gpu_suite")
    del sys.modules["gpu_suite"]


def test_resident_streamed_and_pruned_runs(suite, tmp_path):
    suite.write_words(tmp_path)
    for fit in ("resident", "stream", "prune"):
        setting = suite.Setting("tiny", 64, "layer", tokens=64, steps=3, fit=fit)
        run = suite.attempt(setting, tmp_path, time.monotonic() + 600, [])
        assert run["planned"] == fit and run["within_budget"] and abs(run["prediction_error"]) < 0.05
        assert (run["stream"] is not None) == (fit == "stream") and len(run["losses"]) == 3
    assert not [path for path in tmp_path.iterdir() if path.is_dir() and path.name != "cache"]


def test_streamed_against_resident(suite, tmp_path):
    """The command of the suite, on a small model: the same bits, and times of both sides."""
    arguments = [str(SCRIPT.with_name("gpu_compare.py")), "--model", "tiny", "--tokens", "48,64", "--shares", "0,0.4"]
    found = suite.answer(arguments, tmp_path, 1, 600)
    assert found["equal"] and all(bits["greatest_gradient"] > 0 for bits in found["bits"])
    assert [(row["resident_layers"], row["tokens"]) for row in found["times"]] == [(0, 48), (0, 64), (2, 48), (2, 64)]
    copied = [row["copies"] for row in found["times"]]
    assert (
        copied == [5 * 2 * 3] * 2 + [5 * 2 * 1] * 2
    )  # steps, directions, streamed layers that have no slot of their own
    assert all(row["step_time_over_resident"] > 0 for row in found["times"])


def test_wrong_bits_are_told(monkeypatch, tmp_path):
    """A streamed side that has other weights is no longer equal."""
    compare = load("gpu_compare")
    monkeypatch.setattr(
        compare,
        "load_model",
        lambda base, recipe, device, placement=None: load_model(
            replace(base, synthetic_seed=1) if placement else base, recipe, device, placement=placement
        ),
    )
    assert not compare.compare("tiny", (16,), (0.0,))["equal"]


def test_what_no_longer_fits_the_clock_says_so(suite, tmp_path):
    assert "100 s are left" in suite.answer(["-c", "print(1)"], tmp_path, 101, 100)["skipped"]
    assert "no such thing" in suite.answer(["-c", "raise SystemExit('no such thing')"], tmp_path, 1, 100)["failed"]


def test_what_does_not_fit_its_cap_says_so(suite, tmp_path):
    suite.write_words(tmp_path)
    setting = suite.Setting("tiny", 64, "auto", tokens=64, steps=3, gpu_mem="1M", fit="auto")
    assert "short" in suite.measure(setting, tmp_path)["skipped"]


def test_every_setting_names_what_a_plan_can_make_of_it(suite):
    from effitrain.core.recipe import make_recipe

    for setting in (*suite.FIRST, *suite.THEN):
        assert setting.tokens % setting.max_seq_len == 0 and setting.model in suite.GUESS
        make_recipe({"recompute": setting.recompute, "fit": setting.fit})


@pytest.mark.parametrize(
    ("step", "code"),
    [
        ([{"contender": "effitrain"}, {"contender": "transformers + peft + bitsandbytes", "failed": "no peft"}], 0),
        ([{"contender": "effitrain without kernels", "failed": "out of memory"}], 1),
    ],
)
def test_every_part_is_asked_for_and_one_that_fails_is_told(suite, monkeypatch, tmp_path, step, code):
    """The frame of the suite, its parts replaced; that another library fails is no failure of ours."""
    asked = []

    def answer(arguments, work, needed, left):
        asked.append(" ".join(arguments[-4:]))
        return {"contenders": step} if "step" in arguments else {"equal": True}

    monkeypatch.setattr(suite, "machine", dict)
    monkeypatch.setattr(suite, "tests", lambda work, seconds: {"passed": 1})
    monkeypatch.setattr(suite, "attempt", lambda setting, work, deadline, before: {"seconds": 1.0})
    monkeypatch.setattr(suite, "write_words", lambda work: None)
    monkeypatch.setattr(suite, "answer", answer)
    assert suite.suite(tmp_path / "out.json", time.monotonic() + 600, 600) == code
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found["runs"]) == len(suite.FIRST) + len(suite.THEN) and found["step"]["contenders"] == step
    assert [line.split()[-1] for line in asked] == [str(SCRIPT.with_name("gpu_compare.py")), "8B", "--json"]
