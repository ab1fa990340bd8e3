"""Train small, infer large, from the command line: in one command and in three, and what the report says of it."""

import json
from pathlib import Path

import pytest

SIZES = {"layers": 4, "heads": 8, "kv_heads": 2}
STEPS = 6


@pytest.fixture(scope="module")
def full(tiny_model) -> Path:
    return tiny_model("llama", **SIZES)


@pytest.fixture(scope="module")
def flags(counting) -> list[str]:
    chosen = {"--dataset": counting, "--max-steps": STEPS, "--batch-size": 8, "--grad-accum": 1, "--max-seq-len": 96,
              "--lr": 1e-2, "--lora-r": 4, "--eval-fraction": 0.2}  # fmt: skip
    return [str(part) for pair in chosen.items() for part in pair]


@pytest.fixture(scope="module")
def one(effitrain, full, flags, tmp_path_factory) -> Path:
    """The folder of a run that prunes, trains and recovers in one command."""
    out = tmp_path_factory.mktemp("one") / "out"
    answer = effitrain("run", "--model", full, "--fit", "prune", "--prune-ratio", 0.5, *flags, "-o", out)
    assert answer.code == 0, answer.err
    return out


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_files_and_report_of_one_command(one, full, effitrain, counting):
    for name in ("keep.safetensors", "adapter-small/adapter_config.json", "adapter/adapter_model.safetensors",
                 "small/config.json", "small/keep.safetensors"):  # fmt: skip
        assert (one / name).is_file(), name
    report, plan = read(one / "report.json"), read(one / "plan.json")
    assert report["fit"] == plan["fit"] == "prune" and plan["prune_ratio"] == 0.5
    pruned, loss = report["prune"], report["loss"]
    assert pruned.keys() == {"ratio", "parts", "small_before", "small_after", "gain_share"}
    assert (pruned["ratio"], pruned["parts"]) == (0.5, "ffn+kv")
    gain = loss["eval_before"] - loss["eval_after"]
    assert pruned["gain_share"] == pytest.approx(gain / (pruned["small_before"] - pruned["small_after"]))
    assert gain > 0 and pruned["small_after"] < pruned["small_before"]
    page = (one / "report.html").read_text()
    assert f"{STEPS} steps of the small model" in page and "Evaluation loss of the full model" in page
    facts = read(one / "small/prune.json")
    assert [fit["layer"] for fit in facts["alignment"]] == [1, 1, 2, 2]
    assert all(fit["after"] < fit["before"] for fit in facts["alignment"])


def test_the_reports_losses_are_those_of_the_full_model(one, full, counting):
    """Of the same held-out rows, by a model loaded whole."""
    from effitrain import api
    from effitrain.data.prepare import prepare_data
    from effitrain.evals.perplexity import evaluate_loss
    from effitrain.ready import load_ready
    from effitrain.train.job import make_batches

    recipe = api.recipe(**{**yaml_of(one / "recipe.yaml"), "fit": "resident", **unpruned()})
    plain = load_ready(recipe, None, "score")
    data = prepare_data(plain.recipe, plain.base.tokenizer(), recipe.max_seq_len)
    batches = make_batches(data.eval, plain.recipe)
    loss = read(one / "report.json")["loss"]
    assert evaluate_loss(plain.decoder, batches).loss == pytest.approx(loss["eval_before"], rel=1e-6)
    adapted = load_ready(recipe, str(one), "score")
    assert evaluate_loss(adapted.decoder, batches).loss == pytest.approx(loss["eval_after"], rel=1e-6)


def yaml_of(path: Path) -> dict:
    from effitrain.core.recipe import read_recipe_file

    return read_recipe_file(path)


def unpruned() -> dict:
    from effitrain.core.recipe import Recipe

    return {name: Recipe.model_fields[name].default for name in Recipe.fields_in("pruning")}


def test_three_commands_give_the_same_adapter_byte_for_byte(one, full, flags, effitrain, tmp_path):
    small, run, adapter = tmp_path / "small", tmp_path / "run", tmp_path / "adapter"
    data = [*flags[:2], *flags[8:10], *flags[14:]]
    assert [data[0], data[2], data[4]] == ["--dataset", "--max-seq-len", "--eval-fraction"]
    answers = [
        effitrain("prune", "--model", full, "--prune-ratio", 0.5, *data, "-o", small),
        effitrain("run", "--model", small, *flags, "-o", run),
        effitrain("recover", "--model", full, "--adapter", run, "--keep", small, "-o", adapter),
    ]
    assert [answer.code for answer in answers] == [0, 0, 0], answers
    assert (small / "model.safetensors").read_bytes() == (one / "small/model.safetensors").read_bytes()
    assert losses(run) == losses(one)
    again = tmp_path / "again"
    of_one = effitrain("recover", "--model", full, "--adapter", one, "--keep", one, "-o", again)  # its adapter-small
    assert of_one.code == 0, of_one.err
    name = "adapter_model.safetensors"
    for recovered in (adapter, again):
        assert (recovered / name).read_bytes() == (one / "adapter" / name).read_bytes()


def test_three_commands_scale_positions_as_one_does(full, flags, effitrain, tmp_path):
    """Past the model's length: the small model has the positions, and the recovered adapter brings them."""
    from effitrain.core.positions import same_positions

    longer, yarn = [*flags, "--max-steps", 2, "--max-seq-len", 600], ["--rope-scaling", "yarn"]
    data = [*flags[:2], *flags[14:], "--max-seq-len", 600, *yarn]
    pruned, out = ["--model", full, "--prune-ratio", 0.5], tmp_path / "one"
    answers = [
        effitrain("run", *pruned, "--fit", "prune", *longer, *yarn, "-o", out),
        effitrain("prune", *pruned, *data, "-o", tmp_path / "small"),
        effitrain("run", "--model", tmp_path / "small", *longer, "-o", tmp_path / "run"),
    ]
    for adapter, keep, to in (("run", "small", "adapter"), ("one/adapter-small", "one", "again")):
        chosen = ["--adapter", tmp_path / adapter, "--keep", tmp_path / keep, "-o", tmp_path / to]
        answers.append(effitrain("recover", "--model", full, *chosen))
    assert [answer.code for answer in answers] == [0] * 5, answers
    for name in ("model.safetensors", "config.json", "prune.json"):
        assert (tmp_path / "small" / name).read_bytes() == (out / "small" / name).read_bytes()
    assert losses(tmp_path / "run") == losses(out)
    whole = read(out / "config.json")
    assert whole["max_position_embeddings"] == 1024 and "effitrain_widths" not in whole
    for to in ("adapter", "again"):
        name = "adapter_model.safetensors"
        assert (tmp_path / to / name).read_bytes() == (out / "adapter" / name).read_bytes()
        brought = read(tmp_path / to / "config.json")
        assert same_positions(brought, whole) and "effitrain_widths" not in brought


def test_a_small_model_serves_many_adapters(one, full, flags, effitrain, tmp_path):
    """It is as large as it is, and says so where it is asked to be of another size."""
    pruned = ["--model", full, "--small-model", one / "small"]
    answer = effitrain("run", *pruned, *flags, "--seed", 1, "-o", tmp_path / "other")
    assert answer.code == 0, answer.err
    assert not (tmp_path / "other/small").exists()
    report = read(tmp_path / "other/report.json")["prune"]
    assert (report["ratio"], report["parts"]) == (0.5, "ffn+kv")
    for named in ([], ["--prune-ratio", 0.5]):
        plan = json.loads(effitrain("plan", *pruned, *flags, "--seed", 1, *named, "--json").out)
        assert (plan["prune_ratio"], plan["peak_bytes"]) == (0.5, read(tmp_path / "other/plan.json")["peak_bytes"])
        assert any("is trained on as it is: it was pruned by 0.5" in reason for reason in plan["reasons"])
    answer = effitrain("plan", *pruned, *flags, "--prune-ratio", 0.7)
    assert answer.code == 2 and "was cut by 0.5, and --prune-ratio is 0.7" in answer.err


def test_ratio_zero_is_plain_qlora(full, flags, effitrain, tmp_path):
    pruned = ["--fit", "prune", "--prune-ratio", 0, "-o", tmp_path / "zero"]
    assert effitrain("run", "--model", full, *flags, *pruned).code == 0
    assert effitrain("run", "--model", full, *flags, "-o", tmp_path / "plain").code == 0
    assert losses(tmp_path / "zero") == losses(tmp_path / "plain")
    name = "adapter/adapter_model.safetensors"
    from safetensors.torch import load_file

    zero, plain = (load_file(tmp_path / run / name) for run in ("zero", "plain"))
    assert all(zero[key].equal(plain[key]) for key in plain) and zero.keys() == plain.keys()
    assert read(tmp_path / "zero/report.json")["prune"]["gain_share"] == pytest.approx(1.0, abs=1e-6)


def test_a_second_time_nothing_is_pruned_again(one, full, flags, effitrain):
    before = (one / "small/model.safetensors").stat().st_mtime_ns
    answer = effitrain("run", "--model", full, "--fit", "prune", "--prune-ratio", 0.5, *flags, "-o", one)
    assert answer.code == 0 and (one / "small/model.safetensors").stat().st_mtime_ns == before


def test_a_small_model_that_streams_trains_alike(one, full, flags, effitrain, tmp_path):
    """Layers of three sizes through the same slots."""
    chosen = ["--fit", "prune", "--prune-ratio", 0.5, "--small-model", one / "small", "--resident-layers", 1]
    answer = effitrain("run", "--model", full, *chosen, *flags, "--recompute", "layer", "-o", tmp_path / "streamed")
    assert answer.code == 0, answer.err
    assert read(tmp_path / "streamed/report.json")["stream"]["streamed_layers"] == 3
    assert losses(tmp_path / "streamed") == losses(one)


@pytest.mark.parametrize("score", ["random", "magnitude", "flap", "taylor"])
def test_every_score_from_the_command_line(full, counting, effitrain, score, tmp_path):
    chosen = ["--prune-score", score, "--align", "none", "--prune-parts", "ffn", "--max-seq-len", 96]
    answer = effitrain(
        "prune", "--model", full, "--dataset", counting, "--prune-ratio", 0.5, *chosen, "-o", tmp_path / "s"
    )
    assert answer.code == 0, answer.err
    assert read(tmp_path / "s/config.json")["effitrain_widths"] == {"ffn": [112, 56, 56, 112], "kv_heads": [2] * 4}


def test_plan_knows_the_small_model(full, effitrain):
    answer = effitrain("plan", "--model", full, "--fit", "prune", "--prune-ratio", 0.5, "--json")
    plan = json.loads(answer.out)
    whole = json.loads(effitrain("plan", "--model", full, "--fit", "resident", "--json").out)
    assert (plan["fit"], plan["prune_ratio"]) == ("prune", 0.5) and plan["peak_bytes"] < whole["peak_bytes"]


def test_synthetic_weights_rehearse_it(effitrain, counting, tmp_path):
    chosen = ["--fit", "prune", "--prune-ratio", 0.5, "--weights", "synthetic", "--max-seq-len", 64, "--max-steps", 1]
    answer = effitrain(
        "run", "--model", "tiny", "--dataset", counting, *chosen, "--batch-size", 2, "-o", tmp_path / "o"
    )
    assert answer.code == 0, answer.err
    assert not (tmp_path / "o/small").exists() and (tmp_path / "o/keep.safetensors").is_file()


@pytest.fixture(scope="module")
def pruned_while_training(effitrain, full, flags, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("loraprune") / "out"
    chosen = ["--fit", "prune", "--prune-method", "loraprune", "--prune-ratio", 0.5, "--max-steps", 20]
    answer = effitrain("run", "--model", full, *flags, *chosen, "--save-every", 8, "--keep-checkpoints", 9, "-o", out)
    assert answer.code == 0, answer.err
    return out


def test_loraprune_leaves_a_small_model_that_is_used_like_any_other(pruned_while_training, effitrain, counting):
    out = pruned_while_training
    report = read(out / "report.json")
    assert report["adapter"] is None and not (out / "adapter").exists()
    assert any("--prune-exempt 0,0 makes one" in warning for warning in report["warnings"])
    assert report["prune"]["small_after"] == report["loss"]["eval_after"] < report["loss"]["eval_before"]
    assert read(out / "model/config.json")["effitrain_widths"] == {"ffn": [112, 56, 56, 112], "kv_heads": [2, 1, 1, 2]}
    asked = ["--dataset", counting, "--max-seq-len", 96, "--dtype", "fp32", "--json"]
    found = {}
    for folder, quant in (("model", "nf4"), ("model-nf4", "nf4"), ("model", "none")):
        answer = effitrain("eval", "--model", out / folder, "--quant", quant, *asked)
        assert answer.code == 0, answer.err
        found[folder, quant] = json.loads(answer.out)["loss"]
    assert found["model-nf4", "nf4"] == found["model", "nf4"] != found["model", "none"]
    for folder in ("model", "model-nf4"):
        answer = effitrain("chat", "--model", out / folder, "--prompt", "Count", "--max-new-tokens", 3)
        assert answer.code == 0, answer.err


def test_loraprune_of_every_layer_leaves_what_stock_transformers_loads(full, flags, effitrain, tmp_path):
    """As its plan says. The loss of the folder as our own verb has it."""
    import torch
    from transformers import AutoModelForCausalLM

    chosen = ["--fit", "prune", "--prune-method", "loraprune", "--prune-ratio", 0.5, "--prune-exempt", "0,0"]
    answer = effitrain("run", "--model", full, *flags, *chosen, "--quant", "none", "-o", tmp_path / "out")
    assert answer.code == 0 and "stay whole" not in answer.out, answer
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")
    assert model.config.num_key_value_heads == 1 and model.config.intermediate_size == 56
    ids = torch.randint(0, 60, (1, 40))
    from effitrain.model.decoder import build
    from effitrain.model.load import fill, find_base

    base = find_base(str(tmp_path / "out/model")).fetched()
    ours = fill(build(base.spec, base.source.config, ""), base.weights(), "none", torch.float32, torch.device("cpu"))
    with torch.no_grad():
        found = ours.logits(ours(ids[0], torch.arange(40), (40,)))
        torch.testing.assert_close(found, model(ids).logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("pruned", "advice"), [(True, "a smaller --prune-ratio"), (False, "try a smaller --lr")])
def test_advice_where_the_loss_rose_names_what_raised_it(full, flags, effitrain, tmp_path, pruned, advice):
    chosen = ["--fit", "prune", "--prune-method", "loraprune", "--prune-ratio", 0.5] if pruned else []
    answer = effitrain("run", "--model", full, *flags, *chosen, "--lr", 3, "--max-steps", 2, "-o", tmp_path / "out")
    assert answer.code == 0, answer.err
    (warning,) = [text for text in read(tmp_path / "out/report.json")["warnings"] if "rose from" in text]
    assert advice in warning and ("--lr" in warning) != pruned


def test_loraprune_goes_on_from_a_checkpoint_as_if_nothing_had_happened(pruned_while_training, effitrain, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(pruned_while_training, copy)
    for gone in ("report.json", "report.html"):
        (copy / gone).unlink()
    shutil.rmtree(copy / "model")
    for step in (16, 20):
        shutil.rmtree(copy / f"checkpoints/step-{step}")
    answer = effitrain("run", "--config", copy / "recipe.yaml", "-o", copy)
    assert answer.code == 0 and "step 8 of 20" in answer.out, answer
    weights = [(out / "model/model.safetensors").read_bytes() for out in (copy, pruned_while_training)]
    assert weights[0] == weights[1] and losses(copy) == losses(pruned_while_training)


def test_planner_rows_for_every_ratio_of_the_table(effitrain):
    """Each a way of its own, smaller as more goes, with a speed; the fastest settings of each fit the card."""
    sizes = ["--max-seq-len", 2048, "--batch-size", 1, "--grad-accum", 16, "--recompute", "layer",
             "--offload-activations", "off", "--gpu-mem", "40G", "--host-mem", "64G"]  # fmt: skip
    plan = json.loads(effitrain("plan", "--model", "llama-70b", *sizes, "--json").out)
    rows = {way["prune_ratio"]: way for way in plan["alternatives"] if way["fit"] == "prune"}
    assert list(rows) == [0.5, 0.65, 0.75, 0.85, 0.95] and all(way["fits"] for way in rows.values())
    for smaller, larger in zip(list(rows.values())[1:], rows.values(), strict=False):
        assert smaller["peak_bytes"] < larger["peak_bytes"]
        assert smaller["tokens_per_second_estimate"] > larger["tokens_per_second_estimate"]


@pytest.mark.parametrize(("budget", "at_most", "streams"), [("24G", 16.2, False), ("12G", 12, True), ("8G", 8, True)])
def test_70b_at_085_fits_and_streams_where_that_is_not_enough(effitrain, budget, at_most, streams):
    """Rank 16, float32 adapters and states, head in bf16, one sample of 2,048 tokens."""
    sizes = ["--prune-ratio", 0.85, "--max-seq-len", 2048, "--batch-size", 1, "--gpu-mem", budget, "--host-mem", "64G"]
    answer = effitrain("plan", "--model", "llama-70b", "--fit", "prune", *sizes, "--json")
    plan = json.loads(answer.out)
    assert plan["fits"] and plan["fit"] == "prune" and plan["peak_bytes"] <= at_most * 2**30
    assert (plan["settings"]["streamed"] > 0) == streams and plan["settings"]["optimizer"] == "adamw"


def test_flap_as_published_ranks_across_layers_and_leaves_biases(full, flags, effitrain, tmp_path):
    """Its small model is in NF4 with biases that the full model lacks; the recovered adapter knows nothing of them."""
    from effitrain.adapters.storage import read_adapter

    flap = ["--prune-score", "flap", "--prune-ranking", "global", "--align", "bias", "--prune-exempt", "0,0"]
    flap += ["--prune-round", "1"]
    command = ["run", "--model", full, "--fit", "prune", "--prune-ratio", 0.5, *flap, *flags]
    answer = effitrain(*command, "-o", tmp_path / "flap")
    assert answer.code == 0, answer.err
    assert "Evaluation loss of the small model before" in answer.out and "of the full model after" in answer.out
    config = read(tmp_path / "flap/small/config.json")
    assert sum(config["effitrain_widths"]["ffn"]) == 4 * 56 and len(set(config["effitrain_widths"]["ffn"])) > 1
    assert "model.layers.0.mlp.down_proj" in config["effitrain_biases"] and config["quantization_config"]
    assert all(fit["after"] <= fit["before"] for fit in read(tmp_path / "flap/small/prune.json")["alignment"])
    bundle = read_adapter(tmp_path / "flap/adapter")
    assert {path.rpartition(".")[2] for path in bundle.tensors} >= {"o_proj", "down_proj"}
    assert bundle.tensors["model.layers.0.mlp.down_proj"][1].shape == (4, 112)
    assert read(tmp_path / "flap/report.json")["prune"]["gain_share"] is not None
    proved = json.loads(effitrain("plan", *command[1 : -len(flags)], "--prove", "--json").out)
    assert abs(proved["proof"]["error"]) < 0.03


def test_a_small_model_in_full_precision_gives_the_same_adapter(one, full, flags, effitrain, tmp_path):
    """Quantised when it is loaded instead of when it is cut."""
    from safetensors.torch import load_file

    data = [*flags[:2], *flags[8:10], *flags[14:]]
    pruned = ["--model", full, "--prune-ratio", 0.5, "--quant", "none", *data, "-o", tmp_path / "plain"]
    assert effitrain("prune", *pruned).code == 0
    weights = [load_file(out / "model.safetensors") for out in (tmp_path / "plain", one / "small")]
    assert [{str(tensor.dtype) for tensor in some.values()} for some in weights] == [
        {"torch.float32"}, {"torch.float32", "torch.uint8"},
    ]  # fmt: skip
    assert effitrain("run", "--model", tmp_path / "plain", *flags, "-o", tmp_path / "run").code == 0
    assert losses(tmp_path / "run") == losses(one)


def test_alignment_by_training_every_weight_of_the_small_model(full, flags, effitrain, tmp_path):
    """In one command and by the stage alone: the same small model, nearer to the text; what it took is gone."""
    from safetensors.torch import load_file

    pruned = ["--model", full, "--prune-ratio", 0.5, "--align", "train"]
    answer = effitrain("run", *pruned, "--fit", "prune", *flags, "-o", tmp_path / "one")
    assert answer.code == 0, answer.err
    data = [*flags[:2], *flags[8:10], *flags[14:]]
    assert effitrain("prune", *pruned, *data, "-o", tmp_path / "small").code == 0
    name = "model.safetensors"
    assert (tmp_path / "small" / name).read_bytes() == (tmp_path / "one/small" / name).read_bytes()
    (fact,) = read(tmp_path / "small/prune.json")["alignment"]
    assert fact["steps"] >= 1 and fact["after"] < fact["before"]
    assert effitrain("prune", *pruned[:-1], "none", *data, "-o", tmp_path / "cut").code == 0
    trained, cut = (load_file(tmp_path / out / name) for out in ("small", "cut"))
    changed = [key for key in cut if not trained[key].equal(cut[key])]
    assert any("norm" in key for key in changed) and any("q_proj" in key for key in changed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "one", "small"]
    assert not (tmp_path / "one/small-align").exists()
