"""``effitrain run --method lisa``, ``lisa-lora`` and ``lisa-delta``: what they leave, resuming, and refusals."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

STEPS = 10
METHODS = {
    "plain": ["--method", "lisa", "--quant", "none", "--no-lisa-train-embeddings"],
    "tables": ["--method", "lisa", "--quant", "none", "--lisa-state", "keep-host", "--lisa-sampling", "shuffle"],
    "quantised": ["--method", "lisa", "--no-lisa-train-embeddings", "--lisa-sampling", "outliers"],
    "streamed": ["--method", "lisa", "--no-lisa-train-embeddings", "--fit", "stream", "--lisa-state", "keep-host"],
    "lora": ["--method", "lisa-lora", "--lora-r", "4", "--lora-targets", "q_proj,down_proj,lm_head"],
    "delta": ["--method", "lisa-delta", "--lora-r", "8", "--fit", "stream"],
}


@pytest.fixture(scope="module")
def model(tiny_model) -> Path:
    return tiny_model("llama", layers=6)


@pytest.fixture(scope="module")
def runs(effitrain, model, counting, tmp_path_factory):
    """``runs(name)``: the command of a way, and the folder of its finished run; stopped midway, when asked to."""
    folder, done = tmp_path_factory.mktemp("lisa"), {}
    flags = {
        "--max-steps": STEPS, "--batch-size": 8, "--grad-accum": 1, "--max-seq-len": 96, "--lr": 3e-3,
        "--save-every": 1, "--keep-checkpoints": STEPS, "--lisa-interval": 2, "--lisa-layers": 2,
    }  # fmt: skip
    given = [str(part) for pair in flags.items() for part in pair]

    def run(name: str) -> tuple[list[str], Path]:
        command = ["run", "--model", str(model), "--dataset", str(counting), *given, *METHODS[name]]
        if name not in done:
            answer = effitrain(*command, "-o", folder / name)
            assert answer.code == 0, answer.err
            done[name] = folder / name
        return command, done[name]

    return run


def read(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("name", METHODS)
def test_it_learns_within_its_plan_and_tells_what_took_turns(runs, name):
    _, out = runs(name)
    report = read(out)
    lisa, memory = report["lisa"], report["memory"]
    assert report["loss"]["eval_after"] < report["loss"]["eval_before"]
    assert memory["measured_peak_bytes"] <= 1.03 * memory["predicted_peak_bytes"]
    assert lisa["rounds"] == 5 and sum(lisa["visits"]) == 10 and len({*lisa["state_bytes"]}) == 1
    assert lisa["layers_visited"] == sum(count > 0 for count in lisa["visits"])
    assert ("rank_error_share" in lisa) == (name == "delta")
    assert "Layers by turns" in (out / "report.html").read_text()


@pytest.mark.parametrize("name", ["plain", "tables", "quantised", "streamed"])
def test_the_model_is_the_original_but_for_the_layers_that_were_trained(runs, model, name):
    _, out = runs(name)
    trained, before = (load_file(folder / "model.safetensors") for folder in (out / "model", model))
    assert trained.keys() == before.keys()
    changed = {key for key in before if not torch.equal(trained[key], before[key])}
    visits = read(out)["lisa"]["visits"]
    expected = {key for key in before if key.startswith("model.layers.") and visits[int(key.split(".")[2])]}
    if name == "tables":
        expected |= {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}
    assert changed == expected and len(changed) > 0


@pytest.mark.parametrize("name", ["plain", "quantised", "streamed"])
def test_the_loss_of_the_report_is_that_of_the_model(runs, name):
    from effitrain.core.recipe import make_recipe, read_recipe_file
    from effitrain.data.prepare import prepare_data
    from effitrain.evals.perplexity import evaluate_loss
    from effitrain.model.load import find_base, load_model
    from effitrain.train.job import make_batches

    _, out = runs(name)
    recipe = make_recipe(read_recipe_file(out / "recipe.yaml"))
    data = prepare_data(recipe, find_base(recipe.model).tokenizer(), recipe.max_seq_len)
    plain = make_recipe({"model": recipe.model, "quant": "none", "dtype": "fp32"})
    for folder, loss in ((recipe.model, "eval_before"), (str(out / "model"), "eval_after")):
        decoder = load_model(find_base(folder), plain, torch.device("cpu")).eval()
        found = evaluate_loss(decoder, make_batches(data.eval, recipe)).loss
        assert found == pytest.approx(read(out)["loss"][loss], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "step"), [*((name, 5) for name in METHODS), *((name, 4) for name in ("tables", "streamed", "lora"))]
)
def test_a_run_resumed_within_a_round_or_at_its_end_ends_in_the_same_bytes(runs, effitrain, tmp_path, name, step):
    command, out = runs(name)
    again = tmp_path / "again"
    shutil.copytree(out, again)
    (result,) = [path for path in ("model", "adapter") if (out / path).is_dir()]
    for path in (result, *(f"checkpoints/step-{later}" for later in range(step + 1, STEPS + 1))):
        shutil.rmtree(again / path)
    (again / "report.json").unlink()
    answer = effitrain(*command, "-o", again)
    assert answer.code == 0, answer.err
    assert f"after step {step} of {STEPS}" in answer.out
    weights = Path(result, "model.safetensors" if result == "model" else "adapter_model.safetensors")
    assert (again / weights).read_bytes() == (out / weights).read_bytes()
    assert read(again)["lisa"] == read(out)["lisa"]
    assert read(again)["loss"] == read(out)["loss"]


def test_the_adapter_of_a_delta_run_has_the_loss_of_the_report(runs, effitrain, counting, model):
    from effitrain import api
    from effitrain.core.recipe import make_recipe, read_recipe_file

    _, out = runs("delta")
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (8, 8, False)
    recipe = make_recipe(read_recipe_file(out / "recipe.yaml"))
    scores = [api.evaluate(recipe, adapter)["loss"] for adapter in (None, str(out))]
    assert scores[1] < scores[0]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--method", "lisa", "--prune-ratio", "0.5"], "nothing can be recovered"),
        (["--method", "lisa", "--lora-r", "4"], "--lora-r is for adapters"),
        (["--method", "lisa-delta", "--lora-alpha", "4"], "--lora-alpha is for adapters"),
        (["--method", "lisa-delta", "--lisa-train-embeddings"], "--lisa-train-embeddings is for --method lisa"),
        (["--method", "lisa", "--optimizer", "paged-adamw8bit"], "adamw8bit"),
        (["--method", "lisa", "--lisa-state", "keep-host", "--optimizer", "adamw8bit"], "32-bit states"),
        (["--method", "lora", "--lisa-layers", "4"], "--lisa-layers is for --method lisa"),
        (["--method", "lisa", "--lisa-layers", "0"], "--lisa-layers '0'"),
        (["--method", "lisa", "--lisa-layers", "9"], "has 6 layers"),
        (["--method", "lisa-lora", "--fit", "prune"], "those of a pruned model differ"),
    ],
)
def test_what_cannot_be_is_refused(effitrain, model, counting, tmp_path, flags, reason):
    answer = effitrain("run", "--model", model, "--dataset", counting, *flags, "-o", tmp_path / "out")
    assert answer.code == 2 and reason in answer.err and "Evaluation" not in answer.out


def test_tables_in_layer_order_are_those_of_micro_batch_order(effitrain, model, counting, tmp_path):
    """Of an untied head and the embedding, gradients come in one order; micro-batches pass 4 and 3 at a time."""
    flags = ["--method", "lisa", "--fit", "stream", "--resident-layers", 2, "--lisa-train-embeddings",
             "--max-steps", 4, "--batch-size", 2, "--max-seq-len", 96, "--lr", 3e-3, "--lisa-interval", 2]  # fmt: skip
    for accum in (4, 3):
        found = []
        for order in ("micro-batch", "layer"):
            out = tmp_path / f"{order}-{accum}"
            data = ["--model", model, "--dataset", counting, "--grad-accum", accum, "--stream-order", order]
            answer = effitrain("run", *data, *flags, "-o", out)
            assert answer.code == 0, answer.err
            memory = read(out)["memory"]
            assert memory["measured_peak_bytes"] <= 1.03 * memory["predicted_peak_bytes"]
            assert read(out)["stream"]["micro_batches_together"] == (accum if order == "layer" else 1)
            found.append((read(out)["loss"], (out / "model/model.safetensors").read_bytes()))
        assert found[0] == found[1]


def test_a_table_that_is_embedding_and_head_is_not_trained_in_layer_order(effitrain, tiny_model, counting, tmp_path):
    flags = ["--method", "lisa", "--fit", "stream", "--stream-order", "layer", "--grad-accum", 2]
    answer = effitrain("run", "--model", tiny_model("llama", True), "--dataset", counting, *flags, "-o", tmp_path / "o")
    assert answer.code == 2 and "in another order" in answer.err and "--no-lisa-train-embeddings" in answer.err
