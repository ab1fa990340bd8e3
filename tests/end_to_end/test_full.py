"""``effitrain run --method full``: the model it leaves, its loss in stock transformers, resuming, and refusals."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

STEPS = 6


@pytest.fixture(scope="module")
def command(tiny_model, counting) -> list[str]:
    flags = {
        "--max-steps": STEPS, "--batch-size": 8, "--grad-accum": 1, "--max-seq-len": 96, "--lr": 3e-3,
        "--save-every": 3, "--method": "full",
    }  # fmt: skip
    given = [str(part) for pair in flags.items() for part in pair]
    return ["run", "--model", str(tiny_model("qwen2")), "--dataset", str(counting), *given]


@pytest.fixture(scope="module")
def out(effitrain, command, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("full") / "out"
    answer = effitrain(*command, "-o", folder)
    assert answer.code == 0, answer.err
    assert f"Model:   {folder}/model" in answer.out and "Adapter" not in answer.out
    return folder


def test_it_leaves_a_model_in_which_every_tensor_changed(out, tiny_model):
    trained = load_file(out / "model" / "model.safetensors")
    before = load_file(tiny_model("qwen2") / "model.safetensors")
    assert {name: t.shape for name, t in trained.items()} == {name: t.shape for name, t in before.items()}
    assert all(not torch.equal(trained[name], before[name]) for name in before)
    assert not (out / "adapter").exists()
    report = json.loads((out / "report.json").read_text())
    assert report["adapter"] is None and report["method"] == "full"
    assert report["loss"]["eval_after"] < 0.9 * report["loss"]["eval_before"]
    assert report["memory"]["measured_peak_bytes"] <= 1.02 * report["memory"]["predicted_peak_bytes"]


@pytest.mark.parametrize("verb", ["eval", "export"])
def test_who_asks_for_its_adapter_is_pointed_to_the_model(out, effitrain, tmp_path, verb):
    rest = ["-o", tmp_path / "exported"] if verb == "export" else []
    answer = effitrain(verb, "--model", "tiny", "--adapter", out, *rest)
    assert answer.code == 2 and f"name it with --model {out / 'model'}, without --adapter" in " ".join(
        answer.err.split()
    )


@pytest.mark.filterwarnings("ignore")
def test_the_model_loads_in_stock_transformers_and_has_the_loss_of_the_report(out, command, effitrain):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(out / "model")
    assert (out / "model" / "tokenizer.json").is_file()
    saved = load_file(out / "model" / "model.safetensors")
    assert all(torch.equal(parameter, saved[name]) for name, parameter in model.named_parameters())
    report = json.loads((out / "report.json").read_text())
    # The same rows as the run's own split: the recipe with its data, evaluated on a model of ours.
    from effitrain import api
    from effitrain.core.recipe import make_recipe, read_recipe_file
    from effitrain.data.prepare import prepare_data
    from effitrain.evals.perplexity import evaluate_loss
    from effitrain.model.load import find_base, load_model
    from effitrain.train.job import make_batches

    recipe = make_recipe(read_recipe_file(out / "recipe.yaml"))
    data = prepare_data(recipe, find_base(recipe.model).tokenizer(), recipe.max_seq_len)
    decoder = load_model(find_base(str(out / "model")), recipe.changed(method="lora"), torch.device("cpu")).eval()
    assert evaluate_loss(decoder, make_batches(data.eval, recipe)).loss == report["loss"]["eval_after"]
    assert api.evaluate(recipe.changed(method="lora", model=str(out / "model")))["loss"] > 0


def test_a_resumed_run_ends_in_the_same_bytes(out, command, effitrain, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(out, again)
    shutil.rmtree(again / "model")
    shutil.rmtree(again / "checkpoints" / f"step-{STEPS}")
    (again / "report.json").unlink()
    answer = effitrain(*command, "-o", again)
    assert answer.code == 0, answer.err
    assert "after step 3 of 6" in answer.out
    weights = Path("model", "model.safetensors")
    assert (again / weights).read_bytes() == (out / weights).read_bytes()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [(["--quant", "nf4"], "freezes"), (["--fit", "stream"], "never copied back"), (["--lora-r", "4"], "adapters")],
)
def test_what_it_cannot_do_is_refused_before_loading(command, effitrain, tmp_path, flags, reason):
    answer = effitrain(*command, *flags, "-o", tmp_path / "out")
    assert answer.code == 2 and reason in answer.err and not (tmp_path / "out").exists()
