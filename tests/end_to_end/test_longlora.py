"""Longer context end to end: trained past the model's length, in groups, with norms and embedding; what takes it up."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

STEPS = 4
LONG = ["--attention", "s2", "--s2-group", 24, "--max-seq-len", 600, "--train-norms", "--train-embeddings"]
FLAGS = [*("--max-steps", STEPS, "--batch-size", 4, "--grad-accum", 2, "--lr", "1e-2", "--lora-r", 4),
         *("--quant", "none", "--dtype", "fp32", "--save-every", 1, "--keep-checkpoints", STEPS)]  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_model) -> str:
    return str(tiny_model("llama", layers=3))


@pytest.fixture(scope="module")
def command(model, counting) -> list[object]:
    return ["run", "--quiet", "--model", model, "--dataset", counting, "--eval-dataset", counting, *FLAGS]


@pytest.fixture(scope="module")
def out(effitrain, command, tmp_path_factory) -> Path:
    """A finished run; do not change it."""
    folder = tmp_path_factory.mktemp("long") / "out"
    answer = effitrain(*command, *LONG, "-o", folder)
    assert answer.code == 0, answer.err
    return folder


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@torch.no_grad()
def our_logits(model: str, adapter: Path | None, ids: torch.Tensor) -> torch.Tensor:
    from effitrain import api

    decoder = api.chat(api.recipe(model=model, dtype="fp32", quant="none"), adapter and str(adapter)).decoder
    return decoder.logits(decoder(ids, torch.arange(len(ids)), [len(ids)]))


def test_the_run_leaves_its_positions_and_the_line_that_loads_them(out, model):
    config = json.loads((out / "config.json").read_text())
    assert config["max_position_embeddings"] == 1024 and config["rope_scaling"] == {
        "rope_type": "linear",
        "factor": 2.0,
    }
    report = json.loads((out / "report.json").read_text())
    line = f"AutoModelForCausalLM.from_pretrained({model!r}, config=AutoConfig.from_pretrained({str(out)!r}))"
    facts = {"scaling": "linear", "factor": 2.0, "max_positions": 1024}
    assert report["rope"] == {**facts, "load_with": line}
    assert "from_pretrained" in (out / "report.html").read_text()
    assert losses(out)[-1] < losses(out)[0]
    modules = json.loads((out / "adapter/adapter_config.json").read_text())["modules_to_save"]
    assert modules == ["embed_tokens", "input_layernorm", "norm", "post_attention_layernorm"]


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_stock_peft_loads_it_with_that_line(out, model):
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    line = json.loads((out / "report.json").read_text())["rope"]["load_with"]
    base = eval(line, {"AutoConfig": AutoConfig, "AutoModelForCausalLM": AutoModelForCausalLM})
    stock, ids = PeftModel.from_pretrained(base, out / "adapter").eval(), torch.randint(3, 200, (700,))
    theirs = stock(ids[None]).logits[0]
    for adapter in (out, out / "adapter"):
        ours = our_logits(model, adapter, ids)
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    assert (our_logits(model, None, ids) - theirs).abs().max() > 0.1


def test_eval_takes_the_positions_by_itself_and_attends_in_full(effitrain, out, model, counting, tmp_path):
    common = ["eval", "--model", model, "--dataset", counting, "--max-seq-len", 600, "--quant", "none", "--json"]
    after = json.loads((out / "report.json").read_text())["loss"]["eval_after"]
    answer = effitrain(*common, "--adapter", out)
    assert json.loads(answer.out)["loss"] == pytest.approx(after, rel=1e-6) and not answer.err
    shutil.copytree(out / "adapter", tmp_path / "alone")  # without its positions it is another model
    alone = effitrain(*common, "--adapter", tmp_path / "alone")
    assert json.loads(alone.out)["loss"] != pytest.approx(after, rel=1e-3)
    again = effitrain(*common, "--config", out / "recipe.yaml")  # a recipe with s2 is no obstacle
    assert again.code == 0 and not again.err


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_exports_carry_positions_norms_and_embedding(effitrain, out, model, tmp_path):
    from transformers import AutoModelForCausalLM

    for to in ("peft", "merged"):
        answer = effitrain("export", "--model", model, "--adapter", out, "--to", to, "-o", tmp_path / to)
        assert answer.code == 0, answer.err
    ids = torch.randint(3, 200, (600,))
    ours = our_logits(model, out, ids)
    assert torch.equal(our_logits(model, tmp_path / "peft", ids), ours)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert merged.config.max_position_embeddings == 1024
    scale = ours.abs().max()
    torch.testing.assert_close(merged(ids[None]).logits[0] / scale, ours / scale, rtol=0, atol=0.05)  # bfloat16 weights


def test_a_killed_run_goes_on_bit_for_bit(effitrain, command, out, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(out, folder)
    for later in (3, 4):
        shutil.rmtree(folder / f"checkpoints/step-{later}")
    shutil.rmtree(folder / "adapter")
    (folder / "report.json").unlink()
    answer = effitrain(*command, *LONG, "-o", folder)
    assert answer.code == 0, answer.err
    assert losses(folder) == losses(out)
    mine, theirs = saved(folder / "adapter"), saved(out / "adapter")
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("order", ["micro-batch", "layer"])
def test_streamed_it_is_the_same_run(effitrain, command, out, tmp_path, order):
    stream = ["--fit", "stream", "--resident-layers", 1, "--stream-order", order]
    answer = effitrain(*command, *LONG, *stream, "-o", tmp_path / "out")
    assert answer.code == 0, answer.err
    assert losses(tmp_path / "out") == losses(out)


def test_a_pruned_run_keeps_norms_embedding_and_positions(effitrain, command, model, tmp_path):
    pruned = [
        "--fit",
        "prune",
        "--prune-ratio",
        0.5,
        "--prune-exempt",
        "1,1",
        "--prune-score",
        "magnitude",
        "--align",
        "none",
    ]
    answer = effitrain(*command, *LONG, *pruned, "-o", tmp_path / "out")
    assert answer.code == 0, answer.err
    small, full = saved(tmp_path / "out/adapter-small"), saved(tmp_path / "out/adapter")
    trained = [name for name in full if ".lora_" not in name]
    assert len(trained) == 2 + 2 * 3 and all(torch.equal(small[name], full[name]) for name in trained)
    report = json.loads((tmp_path / "out/report.json").read_text())
    scored = effitrain("eval", "--model", model, "--adapter", tmp_path / "out", "--quant", "none", "--json",
                       "--dataset", command[5], "--max-seq-len", 600)  # fmt: skip
    assert json.loads(scored.out)["loss"] == pytest.approx(report["loss"]["eval_after"], rel=1e-5)


def test_full_tuning_leaves_a_model_with_its_positions(effitrain, command, model, counting, tmp_path):
    lora = command.index("--lora-r")
    flags = ["--method", "full", *LONG[:6], "-o", tmp_path / "out"]
    answer = effitrain(*command[:lora], *command[lora + 2 :], *flags)
    assert answer.code == 0, answer.err
    assert json.loads((tmp_path / "out/model/config.json").read_text())["max_position_embeddings"] == 1024
    after = json.loads((tmp_path / "out/report.json").read_text())["loss"]["eval_after"]
    scored = effitrain("eval", "--model", tmp_path / "out/model", "--dataset", counting, "--max-seq-len", 600,
                       "--quant", "none", "--json")  # fmt: skip
    assert json.loads(scored.out)["loss"] == pytest.approx(after, rel=1e-5)


def test_tiles_take_trained_norms_too(effitrain, command, out, tmp_path):
    """Up to float32 sums in another order."""
    answer = effitrain(*command, *LONG, "--mlp-tiles", 3, "-o", tmp_path / "out")
    assert answer.code == 0, answer.err
    assert losses(tmp_path / "out") == pytest.approx(losses(out), rel=1e-4)


def test_going_on_from_it_asks_for_what_it_holds(effitrain, command, out, tmp_path):
    start = ["--init-adapter", out, "-o", tmp_path / "out"]
    for flags, said in (
        (["--max-seq-len", 600], "Add --train-embeddings and --train-norms."),
        (["--max-seq-len", 600, "--train-norms"], "Add --train-embeddings."),
        (["--train-norms", "--train-embeddings", "--max-seq-len", 96], "other positions"),
        (["--train-norms", "--train-embeddings", "--max-seq-len", 600, "--rope-scaling", "yarn"], "other positions"),
    ):
        answer = effitrain(*command, *flags, *start)
        assert answer.code == 2 and said in answer.err and not (tmp_path / "out").exists()
    flags = ["--train-norms", "--train-embeddings", "--max-seq-len", 600, "--lr", "1e-9"]
    assert effitrain(*command, *flags, *start).code == 0
    assert losses(tmp_path / "out")[0] < losses(out)[0]
    # An evaluation before training that equals the one after: all of it was taken over.
    before, after = (json.loads((folder / "report.json").read_text())["loss"] for folder in (tmp_path / "out", out))
    assert before["eval_before"] == pytest.approx(after["eval_after"], rel=1e-6)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["run", "--s2-group", 64], "--s2-group 64 is for --attention s2"),
        (["run", "--attention", "s2", "--s2-group", 33], "multiple of 2"),
        (["run", "--attention", "s2", "--s2-group", 96, "--max-seq-len", 96], "attention would be full"),
        (["run", "--rope-factor", 2, "--rope-scaling", "none"], "--rope-scaling none leaves them alone"),
        (["run", "--rope-factor", 2, "--max-seq-len", 2000], "reaches 1,024 positions"),
        (["run", "--train-norms", "--prune-method", "loraprune"], "ships a whole model"),
        (["plan", "--model", "llama-3.1-8b", "--max-seq-len", 200000], "llama3 positions of its own"),
        (["plan", "--model", "llama-3.1-8b", "--rope-scaling", "linear"], "llama3 positions of its own"),
        (["eval", "--attention", "s2"], "this verb has no use for it"),
        (["chat", "--train-norms"], "this verb has no use for it"),
    ],
)
def test_what_does_not_go_together_is_refused(effitrain, flags, said):
    answer = effitrain(*flags)
    assert answer.code == 2 and said in answer.err and "Traceback" not in answer.err
