"""The GPU suite rehearsed on a CPU: its runs and what it makes of them, on the built-in model's shape."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_suite.py"


@pytest.fixture(scope="module")
def suite():
    spec = importlib.util.spec_from_file_location("gpu_suite", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["gpu_suite"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_suite"]


def test_a_streamed_run_is_set_against_the_resident_one(suite, tmp_path):
    suite.write_words(tmp_path)
    runs = []
    for fit, layers in (("resident", None), ("stream", 2)):
        setting = suite.Setting("tiny", 64, "layer", tokens=64, steps=3, fit=fit, resident_layers=layers)
        runs.append({**suite.asdict(setting), **suite.measure(setting, tmp_path)})
    assert [run["planned"] for run in runs] == ["resident", "stream"] and all(run["within_budget"] for run in runs)
    assert runs[1]["stream"]["streamed_layers"] == 4 and all(abs(run["prediction_error"]) < 0.05 for run in runs)
    (compared,) = suite.streaming([{**run, "model": "llama-3.1-8b"} for run in runs])
    assert compared["equal_losses"] and compared["tokens"] == 64 and compared["step_time_over_resident"] > 0


def test_what_does_not_fit_its_cap_says_so(suite, tmp_path):
    suite.write_words(tmp_path)
    setting = suite.Setting("tiny", 64, "auto", tokens=64, steps=3, gpu_mem="1M", fit="auto")
    assert "short" in suite.measure(setting, tmp_path)["skipped"]


def test_every_setting_names_what_a_plan_can_make_of_it(suite):
    from effitrain.core.recipe import make_recipe

    for setting in suite.SETTINGS:
        assert setting.tokens % setting.max_seq_len == 0 and setting.model in suite.GUESS
        make_recipe({"recompute": setting.recompute, "fit": setting.fit, "resident_layers": setting.resident_layers})
