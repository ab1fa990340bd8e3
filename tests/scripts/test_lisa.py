"""The short forms of LISA's benchmark and study: they run, and their figures go the way they should."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


def script(name: str, *arguments: object, **environment: str) -> str:
    command = [sys.executable, "-W", "ignore", str(SCRIPTS / name), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("recompute", ["none", pytest.param("layer", marks=pytest.mark.slow)])
def test_the_step_of_lisa_takes_little_more_memory_than_that_of_lora(tmp_path, recompute):
    """Of a small model; the script's defaults are the whole."""
    script(
        "bench_lisa.py", "--steps", 1, "--layers", 4, "--tokens", 128, "--small", "--recompute", recompute,
        "--out", tmp_path / "bench.json",
    )  # fmt: skip
    sides = json.loads((tmp_path / "bench.json").read_text())["sides"]
    assert all(abs(side["planned_bytes"] / side["step_peak_bytes"] - 1) < 0.05 for side in sides.values())
    size = {name: side["memory_of_lora"] for name, side in sides.items()}
    assert size["lisa-lora"] < 1 < size["lisa"] < size["lisa, embeddings too"] < size["full"]
    assert size["lisa"] < 2  # states of two layers of four


def test_the_step_of_lisa_on_a_hundred_million_parameters_by_the_plan():
    """The promise itself: at most 1.1 times LoRA's, by plans that the run above and ``test_proof.py`` check."""
    from effitrain.core.budget import MemoryBudget
    from effitrain.core.plan import make_plan
    from effitrain.core.recipe import make_recipe
    from effitrain.core.spec import spec_from_config

    config = {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048,
        "num_attention_heads": 12, "num_key_value_heads": 4, "max_position_embeddings": 512,
        "tie_word_embeddings": False, "num_hidden_layers": 12,
    }  # fmt: skip
    form = {"quant": "none", "dtype": "fp32", "fit": "resident", "recompute": "none", "optimizer": "adamw"}
    sizes = {"batch_size": 4, "max_seq_len": 512, "grad_accum": 1}
    budget = MemoryBudget(2**50, 2**50, 0, "cpu")

    def peak(**fields: object) -> int:
        return make_plan(spec_from_config(config, "bench"), make_recipe({**form, **sizes, **fields}), budget).peak_bytes

    lora, lisa = peak(), peak(method="lisa", lisa_train_embeddings=False)
    assert lisa <= 1.1 * lora


def test_the_study_goes_on_where_it_stopped(data_dir, tmp_path):
    (tmp_path / "lisa.md").write_text("before\n<!-- study_lisa -->\nold\n<!-- /study_lisa -->\nafter\n")

    def study() -> tuple[dict, int]:
        printed = script("study_lisa.py", "-o", tmp_path, "--quick", EFFITRAIN_DATA=str(data_dir))
        done = sum("'method'" in line for line in printed.splitlines())
        return json.loads((tmp_path / "study_lisa.json").read_text()), done

    first, done = study()
    assert done == len(first["runs"]) == 7
    assert {run["method"] for run in first["runs"]} == {"lora", "full", "lisa", "lisa-delta"}
    assert next(run["loss"] for run in first["runs"] if run["method"] == "lora") < first["base"]["gsm8k"]
    page = (tmp_path / "lisa.md").read_text()
    assert page.startswith("before\n") and page.endswith("after\n") and "old" not in page
    assert "| gsm8k | lisa-delta, rank 64 |" in page
    dropped = first["runs"].pop(3)
    (tmp_path / "study_lisa.json").write_text(json.dumps(first))
    again, done = study()
    assert done == 1 and again["runs"][-1] == dropped
