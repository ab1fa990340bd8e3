"""Every data format trains from a real file on a real model, and the adapter is right on NF4 weights too."""

import json
from pathlib import Path

import pytest
import torch

FORMATS = {
    "alpaca": ("instruct/alpaca/alpaca_2000.json", "alpaca", 2000, []),
    "self-instruct": ("instruct/self_instruct/seed_tasks.jsonl", "alpaca", 175, ["--eval-fraction", 0.1]),
    "sharegpt": ("instruct/sharegpt/dummy_conversation.json", "sharegpt", None, []),
    "identity": ("instruct/llamafactory/identity.json", "alpaca", 91, []),
    "gsm8k": ("instruct/gsm8k/test_500.jsonl", "prompt-completion", 500, ["--format", "prompt-completion"]),
    "messages": ("instruct/llamafactory/reason_tool_use_demo_50.jsonl", "messages", None, ["--truncation", "left"]),
    "tinystories": ("corpora/tinystories/valid_stories.jsonl", "text", None, ["--lr", 1e-3]),
    "moby dick": ("corpora/books/moby_dick_2701.txt", "text", None, ["--packing"]),
}
# A plain peft loop with these settings takes 20 % off the loss on Alpaca; the bounds are those of the first plan.
LESSONS = {"alpaca": ("instruct/alpaca/alpaca_2000.json", 0.15), "gsm8k": ("instruct/gsm8k/train_3000.jsonl", 0.4)}


@pytest.fixture(scope="module")
def model(data_dir) -> str:
    return str(data_dir / "models" / "stories260K")


@pytest.mark.parametrize("name", FORMATS)
def test_a_real_file_of_every_format_trains(effitrain, data_dir, model, tmp_path, name):
    file, format, samples, extra = FORMATS[name]
    flags = ["--max-steps", 8, "--batch-size", 4, "--grad-accum", 1, "--max-seq-len", 192, "--lr", 1e-2]
    precise = ["--quant", "none", "--eval-fraction", 0.01, "--lora-r", 4, "--seed", 1]
    out = tmp_path / "out"
    answer = effitrain("run", "--model", model, "--dataset", data_dir / file, *flags, *precise, *extra, "-o", out)
    assert answer.code == 0, answer.err

    report = json.loads((out / "report.json").read_text())
    data, loss = report["data"], report["loss"]
    assert samples is None or data["samples"] + data["dropped"] == samples
    told = " ".join(answer.out.split())  # lines are wrapped
    assert f"samples ({format}, " in told and f"{data['trained_share']:.0%} trained" in told
    assert "«" in answer.out and (0.98 if format == "text" else 0.05) < data["trained_share"] < 1
    assert loss["eval_after"] < loss["eval_before"]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("lesson", LESSONS)
def test_a_real_model_learns_from_real_instructions(effitrain, data_dir, tmp_path, lesson):
    """The settings of the first plan to the letter; NF4, as by default."""
    file, share = LESSONS[lesson]
    flags = ["--gpu-mem", "2G", "--max-steps", 60, "--batch-size", 8, "--max-seq-len", 512, "--lora-r", 16]
    base, out = data_dir / "models" / "stories3M", tmp_path / "out"
    answer = effitrain("run", "--model", base, "--dataset", data_dir / file, *flags, "--lr", 2e-3, "-o", out)
    assert answer.code == 0, answer.err
    loss = json.loads((out / "report.json").read_text())["loss"]
    fall = 1 - loss["eval_after"] / loss["eval_before"]
    print(f"{lesson}: {loss['eval_before']:.3f} to {loss['eval_after']:.3f}, {fall:.3f} less")
    assert fall >= share


@pytest.fixture(scope="module")
def adapted(effitrain, model, data_dir, tmp_path_factory) -> Path:
    """The folder of a run in NF4 and float32."""
    out = tmp_path_factory.mktemp("nf4") / "out"
    flags = ["--max-steps", 8, "--batch-size", 8, "--grad-accum", 1, "--max-seq-len", 128, "--lr", 5e-3]
    data = ["--dataset", data_dir / "instruct/llamafactory/identity.json"]
    answer = effitrain("run", "--model", model, *data, *flags, "--quant", "nf4", "--dtype", "fp32", "-o", out)
    assert answer.code == 0, answer.err
    return out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quant", ["nf4", "none"])
@torch.no_grad()
def test_stock_peft_gives_the_same_logits(model, adapted, quant):
    """In NF4 against the stock model that holds bitsandbytes' dequantised weights in float32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if quant == "nf4":
        dequantised(base)
    stock = PeftModel.from_pretrained(base, adapted / "adapter").eval()
    ids = AutoTokenizer.from_pretrained(model)("Once upon a time there was a whale.\nWho are you?", return_tensors="pt")
    theirs = stock(ids["input_ids"]).logits[0]
    with stock.disable_adapter():
        assert (stock(ids["input_ids"]).logits[0] - theirs).abs().max() > 0.1
    assert (our_logits(model, adapted, ids["input_ids"][0], quant) - theirs).abs().max() <= 1e-4


def dequantised(model: torch.nn.Module) -> None:
    """Replace the weights of the decoder's linears by what bitsandbytes' NF4 leaves of them."""
    from bitsandbytes import functional

    for name, module in model.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            packed, state = functional.quantize_4bit(module.weight.data, quant_type="nf4", compress_statistics=True)
            exact = functional.dequantize_4bit(packed, state)
            assert not torch.equal(exact, module.weight), name
            module.weight.copy_(exact)


def our_logits(model: str, adapter: Path, ids: torch.Tensor, quant: str) -> torch.Tensor:
    from effitrain import api

    decoder = api.chat(api.recipe(model=model, dtype="fp32", quant=quant), str(adapter)).decoder
    return decoder.logits(decoder(ids, torch.arange(len(ids)), [len(ids)]))
