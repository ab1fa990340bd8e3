"""The commands that a new user types first, to the letter: nothing is set up, nothing is named."""

import json
import time

import pytest


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_run_alone_teaches_the_built_in_model(effitrain, tmp_path):
    """Under two minutes of CPU, which other jobs cannot stretch; evaluation loss lower by a quarter."""
    started = time.process_time()
    answer = effitrain("run")
    assert time.process_time() - started < 120
    assert answer.code == 0, answer.err
    out = tmp_path / "effitrain-out"
    assert [path.name for path in tmp_path.iterdir()] == ["effitrain-out"] and (out / "report.html").is_file()
    report = json.loads((out / "report.json").read_text())
    assert report["model"] == "tiny"
    assert report["loss"]["eval_after"] < 0.75 * report["loss"]["eval_before"]
    for text in (
        "built-in instruction set",
        "Evaluation loss before",
        "Evaluation loss after",
        "effitrain-out/adapter",
    ):
        assert text in answer.out
    said = effitrain("chat", "--adapter", "effitrain-out", "--prompt", "Where does Ada live?", "--max-new-tokens", 30)
    assert said.code == 0 and said.out.strip().endswith("."), said


def test_a_70b_says_what_to_do_about_its_weights(effitrain):
    answer = effitrain("run", "--model", "llama-70b", "--gpu-mem", "20G")
    assert answer.code == 2 and "built-in instruction set" in answer.out
    for words in ("meta-llama/Llama-3.1-70B", "hf auth login", "--model FOLDER", "--weights synthetic"):
        assert words in answer.err


def test_a_70b_rehearsed_ends_in_its_ledger(effitrain):
    answer = effitrain("run", "--model", "llama-70b", "--gpu-mem", "2G", "--weights", "synthetic")
    assert answer.code == 3 and "does not fit" in answer.out and "streaming slots" in answer.out
    assert answer.err.startswith("effitrain: The model needs ") and "the budget is 2.0 GiB" in answer.err


def test_plan_needs_nothing(effitrain, tmp_path):
    answer = effitrain("plan", "--model", "llama-70b", "--gpu", "rtx4090")
    assert answer.code == 0 and "llama-70b (70.6B parameters), stream: fits" in answer.out
    assert effitrain("plan", "--model", "llama-3.1-8b", "--gpu-mem", "20G").code == 0
    assert effitrain("plan").code == 0 and not [*tmp_path.iterdir()]


def test_doctor_finds_nothing_wrong(effitrain):
    answer = effitrain("doctor")
    assert answer.code == 0, answer.out
    assert "ok" in answer.out and "wrong" not in answer.out
