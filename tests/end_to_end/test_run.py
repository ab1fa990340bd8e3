"""``effitrain run`` from the command to the files of the contract; a second time; and as a rehearsal."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from effitrain.core.disk import bytes_to_come
from effitrain.core.recipe import make_recipe, read_recipe_file
from effitrain.io.disk import folder_bytes
from effitrain.model.load import find_base
from effitrain.planning import plan

STEPS = 12
PLAN_KEYS = {
    *("fits", "fit", "budget_bytes", "peak_bytes", "host_peak_bytes", "overhead_bytes", "resident_layers"),
    *("prune_ratio", "micro_batch_tokens", "model", "ledger", "alternatives", "reasons", "proof", "settings"),
    "tokens_per_second_estimate",
}
REPORT_KEYS = {
    *("model", "fit", "method", "steps", "tokens", "seconds", "tokens_per_second", "loss", "memory", "data"),
    *("stream", "prune", "lisa", "positions", "samples", "rope", "adapter", "versions", "warnings"),
}
METRICS_KEYS = {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "device_peak_bytes"}


@pytest.fixture(scope="module")
def command(tiny_model, counting) -> list[str]:
    flags = {"--max-steps": STEPS, "--batch-size": 8, "--grad-accum": 1, "--max-seq-len": 96, "--lr": 1e-2}
    precise = ["--quant", "none", "--dtype", "fp32"]
    given = [str(part) for pair in flags.items() for part in pair]
    return ["run", "--model", str(tiny_model()), "--dataset", str(counting), *precise, *given]


def in_a_process(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as a user types it, in ``folder``."""
    program = [str(Path(sys.executable).with_name("effitrain")), *arguments]
    return subprocess.run(program, cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def done(command, tmp_path_factory) -> tuple[Path, str]:
    """The folder of a finished run, made by a real process in ``out``, and what it printed."""
    folder = tmp_path_factory.mktemp("done")
    answer = in_a_process(folder, *command, "-o", "out")
    assert answer.returncode == 0, answer.stderr
    assert "Traceback" not in answer.stderr and "Warning" not in answer.stderr
    return folder / "out", answer.stdout


@pytest.fixture(scope="module")
def out(done) -> Path:
    """The folder of that run; do not change it."""
    return done[0]


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_file_of_the_contract_is_there_and_no_other(out):
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    saved = {"trainable.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}
    assert files == {
        *("recipe.yaml", "plan.json", "run.json", "metrics.jsonl", "report.json", "report.html", "loss.png"),
        *("adapter/adapter_config.json", "adapter/adapter_model.safetensors"),
        *(f"checkpoints/step-{step}/{name}" for step in (STEPS - 1, STEPS) for name in saved),
    }


def test_plan_json(out):
    plan = read(out / "plan.json")
    assert plan.keys() == PLAN_KEYS
    assert plan["model"].keys() == {"name", "params", "linear_params", "layers", "hidden", "vocab"}
    assert all(line.keys() == {"what", "where", "bytes", "formula"} for line in plan["ledger"])
    for where, total in (("gpu", "peak_bytes"), ("host", "host_peak_bytes")):
        assert sum(line["bytes"] for line in plan["ledger"] if line["where"] == where) == plan[total]
    keys = {"fit", "prune_ratio", "fits", "peak_bytes", "host_peak_bytes", "tokens_per_second_estimate", "why"}
    assert plan["alternatives"] and all(way.keys() == keys for way in plan["alternatives"])
    assert plan["fits"] and plan["fit"] == "resident" and plan["proof"] is None and plan["prune_ratio"] is None


def test_report_json(out, command):
    report, plan = read(out / "report.json"), read(out / "plan.json")
    assert report.keys() == REPORT_KEYS
    assert report["loss"].keys() == {"first", "last", "eval_before", "eval_after"}
    keys = {"budget_bytes", "predicted_peak_bytes", "measured_peak_bytes", "peak_rss_bytes"}
    memory = report["memory"]
    assert memory.keys() == keys and 0 < memory["predicted_peak_bytes"] <= plan["peak_bytes"]
    assert 0 < memory["measured_peak_bytes"] <= memory["budget_bytes"] == plan["budget_bytes"]
    assert report["data"].keys() == {"samples", "trained_share", "truncated", "dropped"}
    assert report["data"]["samples"] == 40 and 0.1 < report["data"]["trained_share"] < 0.9
    assert (report["model"], report["steps"], report["method"], report["fit"]) == (
        command[2],
        STEPS,
        "lora",
        "resident",
    )
    assert report["adapter"] == "adapter" and report["stream"] is None and report["prune"] is None
    assert report["seconds"] > 0 and report["tokens_per_second"] == report["tokens"] / report["seconds"]


def test_metrics_jsonl_tells_every_step_and_the_loss_falls(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    report = read(out / "report.json")
    assert all(line.keys() == METRICS_KEYS for line in lines)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert sum(line["tokens"] for line in lines) == report["tokens"]
    assert lines[0]["loss"] == report["loss"]["first"] and lines[-1]["loss"] == report["loss"]["last"]
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert report["loss"]["eval_after"] < 0.8 * report["loss"]["eval_before"]
    assert all(line["device_peak_bytes"] == report["memory"]["measured_peak_bytes"] for line in lines)


def test_what_it_prints(done):
    out, printed = done
    share = read(out / "report.json")["data"]["trained_share"]
    assert "40 samples (alpaca, template plain)" in printed and f"{share:.0%} trained" in printed
    assert "fits.\nPeak" in printed and "«" in printed and "Evaluation loss before" in printed
    assert printed.index("fits.\nPeak") < printed.index("trained") < printed.index("loss before")
    assert printed.index("loss before") < printed.index("loss after") < printed.index("out/adapter")


def test_the_report_is_one_page_of_its_own(out):
    page = (out / "report.html").read_text(encoding="utf-8")
    assert 'src="data:image/png;base64,' in page and "http-equiv" not in page and "<script src" not in page
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_its_checkpoints_take_the_disk_that_was_forecast(out):
    recipe = make_recipe(read_recipe_file(out / "recipe.yaml"))
    forecast = bytes_to_come(find_base(recipe.model).spec, recipe, plan(recipe), STEPS)
    held = folder_bytes(out / "checkpoints") * 3 // 2  # two are kept, and a third was written beside them
    assert forecast == pytest.approx(held, rel=0.05) and forecast < held


def test_a_disk_too_full_for_them_is_told_before_loading(effitrain, command, tmp_path, monkeypatch):
    """There is room for a checkpoint of 366 KiB beside one that is kept, and not for a third."""
    monkeypatch.setattr("effitrain.io.disk.shutil.disk_usage", lambda path: SimpleNamespace(free=800 * 2**10))
    answer = effitrain(*command, "-o", tmp_path / "out")
    assert answer.code == 2 and "Evaluation" not in answer.out and not list(tmp_path.rglob("step-*"))
    assert f"more in {tmp_path / 'out'}, and 800 KiB are free there: " in answer.err
    assert "KiB are missing.\nKeep fewer with --keep-checkpoints 1, which takes" in answer.err
    assert effitrain(*command, "-o", tmp_path / "out", "--keep-checkpoints", 1).code == 0


def test_finished_is_finished(effitrain, command, out, digests):
    before = digests(out)
    answer = effitrain(*command, "-o", out)
    assert answer.code == 0 and "finished" in answer.out and not answer.err
    assert digests(out) == before
    as_json = effitrain(*command, "-o", out, "--json")
    assert as_json.code == 0 and json.loads(as_json.out) == read(out / "report.json")
    assert digests(out) == before


def test_a_run_whose_adapter_is_gone_is_not_finished(effitrain, command, out, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(out, again)
    shutil.rmtree(again / "adapter")
    assert effitrain(*command, "-o", again).code == 0
    weights = Path("adapter", "adapter_model.safetensors")
    assert (again / weights).read_bytes() == (out / weights).read_bytes()


def test_the_recipe_it_leaves_repeats_it(effitrain, out, tmp_path):
    answer = effitrain("run", "--config", out / "recipe.yaml", "-o", tmp_path / "again", "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["loss"] == read(out / "report.json")["loss"]
    weights = Path("adapter", "adapter_model.safetensors")
    assert (tmp_path / "again" / weights).read_bytes() == (out / weights).read_bytes()


def test_dry_run_plans_and_leaves_nothing(effitrain, command, tmp_path):
    answer = effitrain(*command, "--dry-run", "-o", tmp_path / "out")
    assert answer.code == 0 and "fits.\nPeak" in answer.out and "Evaluation" not in answer.out
    as_json = effitrain(*command, "--dry-run", "--json", "-o", tmp_path / "out")
    assert as_json.code == 0 and json.loads(as_json.out).keys() == PLAN_KEYS
    planned = effitrain(*command, "--dry-run", "--quiet", "--gpu", "rtx4090", "-o", tmp_path / "out")
    assert (planned.code, planned.out, planned.err) == (0, "", "")
    assert not list(tmp_path.rglob("*"))


def test_too_few_rows_for_an_evaluation_set_are_all_trained_on(effitrain, command, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n')
    answer = effitrain(*command, "--dataset", rows, "--max-steps", 1, "-o", tmp_path / "out")
    assert answer.code == 0, answer.err
    assert "Data: 2 samples (" in answer.out and "0 samples for evaluation." in answer.out
    assert "No sample is kept for evaluation: --eval-fraction 0.05 of so few rows is none." in " ".join(
        answer.out.split()
    )
    assert read(tmp_path / "out" / "report.json")["loss"]["eval_before"] is None
