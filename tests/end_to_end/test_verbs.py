"""What the other verbs make of a finished run: scores, answers, exports, and stock peft as judge."""

import io
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def model(tiny_model) -> str:
    return str(tiny_model())


@pytest.fixture(scope="module")
def out(effitrain, model, counting, tmp_path_factory) -> Path:
    """A finished run whose adapter changes much; do not change it."""
    folder = tmp_path_factory.mktemp("verbs") / "out"
    flags = ["--max-steps", 8, "--batch-size", 8, "--grad-accum", 1, "--max-seq-len", 96, "--lr", 1e-2, "--lora-r", 4]
    data = ["--dataset", counting, "--eval-dataset", counting]
    answer = effitrain("run", "--model", model, *data, *flags, "--quant", "none", "-o", folder)
    assert answer.code == 0, answer.err
    return folder


@torch.no_grad()
def our_logits(model: str, adapter: Path, ids: torch.Tensor) -> torch.Tensor:
    from effitrain import api

    decoder = api.chat(api.recipe(model=model, dtype="fp32", quant="none"), str(adapter)).decoder
    return decoder.logits(decoder(ids, torch.arange(len(ids)), [len(ids)]))


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_stock_peft_on_the_stock_model_gives_the_same_logits(model, out):
    """Up to float32 sums in another order."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), out / "adapter").eval()
    ids = torch.arange(3, 93)
    theirs = stock(ids[None]).logits[0]
    with stock.disable_adapter():
        assert (stock(ids[None]).logits[0] - theirs).abs().max() > 1
    assert (our_logits(model, out, ids) - theirs).abs().max() <= 1e-4


def test_eval_scores_as_the_run_did(effitrain, model, out, counting):
    common = ["--model", model, "--dataset", counting, "--max-seq-len", 96, "--quant", "none"]
    report = json.loads((out / "report.json").read_text())["loss"]
    plain = effitrain("eval", *common, "--json")
    adapted = effitrain("eval", *common, "--json", "--adapter", out, "--batch-size", 3)
    assert plain.code == adapted.code == 0, adapted.err
    before, after = json.loads(plain.out), json.loads(adapted.out)
    assert list(before) == list(after) == ["loss", "perplexity", "tokens", "model", "adapter"]
    assert before["loss"] == pytest.approx(report["eval_before"], rel=1e-5)
    assert after["loss"] == pytest.approx(report["eval_after"], rel=1e-5) and after["loss"] < before["loss"]
    assert after["perplexity"] == math.exp(after["loss"]) and after["tokens"] == before["tokens"] > 0
    assert (before["adapter"], after["adapter"]) == (None, str(out)) and before["model"] == model
    said = effitrain("eval", *common, "--adapter", out / "adapter")
    assert said.code == 0 and f"loss {after['loss']:.4f}" in said.out and "NF4" not in said.out


def test_eval_by_position_and_passkeys(effitrain, model, counting):
    common = ["eval", "--model", model, "--quant", "none", "--max-seq-len", 96]
    whole = json.loads(effitrain(*common, "--dataset", counting, "--json").out)
    by_position = json.loads(effitrain(*common, "--dataset", counting, "--by-position", 16, "--json").out)
    buckets = by_position.pop("by_position")
    assert [(bucket["start"], bucket["end"]) for bucket in buckets] == [(n, n + 16) for n in range(32, 96, 16)]
    assert by_position["tokens"] == sum(bucket["tokens"] for bucket in buckets) == whole["tokens"]
    assert by_position["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    said = effitrain(*common, "--dataset", counting, "--by-position")
    assert said.code == 0 and said.out.splitlines()[1].startswith("positions      0 to    255  loss")
    keys = json.loads(effitrain(*common, "--passkey", "400,500", "--json").out)
    assert list(keys) == ["model", "adapter", "passkey"]
    assert [(one["length"], one["trials"]) for one in keys["passkey"]] == [(400, 5)] * 5 + [(500, 5)] * 5
    for bad in ("x", "0", "400;500"):
        assert effitrain(*common, "--passkey", bad).code == effitrain(*common, "--by-position", bad).code == 2
    assert "has no room for the question" in effitrain(*common, "--passkey", 60).err


@pytest.mark.parametrize("by_position", [None, 16])
def test_eval_reads_a_streamed_layer_once_for_several_micro_batches(tiny_model, counting, monkeypatch, by_position):
    from effitrain import api

    seen, real = [], api.score
    monkeypatch.setattr(api, "score", lambda *given: (seen.append(given), real(*given))[1])
    fields = {"fit": "stream", "resident_layers": 0, "stream_order": "layer", "batch_size": 1, "grad_accum": 4}
    asked = api.recipe(model=str(tiny_model(layers=6)), dataset=str(counting), max_seq_len=96, **fields)
    api.evaluate(asked, by_position=by_position)
    decoder, batches, at_once, _ = seen[0]
    assert at_once == 4 and batches.per_epoch > 8
    assert decoder.streamer.traffic.copies <= len(decoder.layers) * -(-batches.per_epoch // at_once)


def test_chat_answers_once(effitrain, model, out):
    common = ["chat", "--model", model, "--adapter", out, "--quant", "none", "--prompt", "Count from 5"]
    greedy = [effitrain(*common, "--max-new-tokens", 24) for _ in range(2)]
    assert greedy[0].code == 0 and greedy[0].out.strip() and greedy[0] == greedy[1]
    assert len(effitrain(*common, "--max-new-tokens", 3).out) < len(greedy[0].out)
    sampled = {
        seed: effitrain(*common, "--max-new-tokens", 24, "--temperature", 1.5, "--seed", seed).out for seed in (1, 2)
    }
    assert sampled[1] != sampled[2] and greedy[0].out not in sampled.values()
    base = effitrain("chat", "--model", model, "--quant", "none", "--prompt", "Count from 5", "--max-new-tokens", 24)
    assert base.code == 0 and base.out != greedy[0].out


def test_several_prompts_are_answered_as_each_alone(effitrain, model, out):
    common = ["chat", "--model", model, "--adapter", out, "--quant", "none", "--max-new-tokens", 8]
    alone = [effitrain(*common, "--prompt", text).out for text in ("Count from 5", "Count from 17 by one")]
    both = effitrain(*common, "--prompt", "Count from 5", "--prompt", "Count from 17 by one")
    assert both.code == 0 and both.out == "".join(alone)


def test_chat_talks_until_an_empty_line(effitrain, model, out, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Count from 5\nand on\n\nnever read\n"))
    answer = effitrain("chat", "--model", model, "--adapter", out, "--quant", "none", "--max-new-tokens", 8)
    assert answer.code == 0 and answer.err.count("> ") == 3
    once = effitrain(
        *("chat", "--model", model, "--adapter", out, "--quant", "none", "--max-new-tokens", 8),
        *("--prompt", "Count from 5"),
    )
    assert answer.out.startswith(once.out) and len(answer.out) > len(once.out)


def test_export_to_peft_is_the_same_adapter(effitrain, model, out, tmp_path):
    """With the scale, alpha / r = 8, in B."""
    answer = effitrain("export", "--model", model, "--adapter", out, "-o", tmp_path / "peft")
    assert answer.code == 0 and answer.out == f"Written: {tmp_path / 'peft'}\n"
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (out / "adapter", tmp_path / "peft"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(t, theirs[name] / (8 if "lora_B" in name else 1)) for name, t in ours.items())
    configs = [json.loads((f / "adapter_config.json").read_text()) for f in (out / "adapter", tmp_path / "peft")]
    assert [(config["r"], config["lora_alpha"]) for config in configs] == [(4, 32), (4, 4)]
    leaves = [{name.rpartition(".")[2] for name in config["target_modules"]} for config in configs]
    assert leaves[0] == leaves[1]


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_export_merged_loads_in_stock_transformers(effitrain, model, out, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    answer = effitrain("export", "--model", model, "--adapter", out, "--to", "merged", "-o", tmp_path / "merged")
    assert answer.code == 0 and "in bf16" in answer.out, answer.err
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").eval()
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token == "</s>"
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), out / "adapter").merge_and_unload()
    expected = stock.bfloat16().state_dict()
    for name, tensor in merged.state_dict().items():
        # One unit in the last place of bfloat16: the float32 sum may fall on the other side of a rounding edge.
        torch.testing.assert_close(tensor.float(), expected[name].float(), rtol=2**-7, atol=1e-6, msg=name)
    ids = torch.arange(3, 93)[None]
    torch.testing.assert_close(merged(ids).logits, stock(ids).logits, rtol=0.05, atol=0.5)
