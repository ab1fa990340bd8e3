"""The form that peft, vLLM and llama.cpp read alike: stock peft gives the logits of the original from it, and so do the
rules by which the other two scale an update.
"""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from effitrain import api
from effitrain.adapters.portable import check_alive, for_peft_alone, one_rank
from effitrain.adapters.storage import read_adapter
from effitrain.core.errors import InputError

WEIGHTS = "adapter_model.safetensors"
PATTERNS = {"rank_pattern": {"q_proj": 5, r"1\.mlp\.(up|down)_proj": 2}, "alpha_pattern": {"0.self_attn.q_proj": 7}}
WHERE = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(params=["plain", "patterns", "rslora", "rslora with patterns"])
def original(request, tiny_model, tmp_path):
    """The folder of an adapter that stock peft saved, and its config."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    how = {**WHERE, "use_rslora": "rslora" in request.param, **(PATTERNS if "patterns" in request.param else {})}
    base = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    get_peft_model(base, LoraConfig(**how, init_lora_weights=False)).save_pretrained(tmp_path / "original")
    return tmp_path / "original"


@torch.no_grad()
def stock_logits(model, adapter):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter).eval()
    return stock(torch.arange(3, 93)[None]).logits[0]


@torch.no_grad()
def our_logits(model, adapter):
    decoder = api.chat(api.recipe(model=model, dtype="fp32", quant="none"), str(adapter)).decoder
    return decoder.logits(decoder(torch.arange(3, 93), torch.arange(90), [90]))


def updates(folder, scale_of):
    """The update of every linear as a program sees it that scales by ``scale_of(config, B)``."""
    config, tensors = json.loads((folder / "adapter_config.json").read_text()), load_file(folder / WEIGHTS)
    sides = {key.removesuffix(".lora_B.weight"): B for key, B in tensors.items() if "lora_B" in key}
    return {path: scale_of(config, B) * (B @ tensors[f"{path}.lora_A.weight"]) for path, B in sides.items()}


def of_vllm(config, B):
    assert not config["modules_to_save"] and not config.get("use_dora") and config["bias"] == "none"
    return config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])


def of_llama_cpp(config, B):
    return config["lora_alpha"] / B.shape[1]


def test_all_readers_see_the_update_of_the_original(tiny_model, original, tmp_path):
    model = str(tiny_model("llama"))
    written = api.export(api.recipe(model=model), str(original), str(tmp_path / "peft"))
    config = json.loads((written / "adapter_config.json").read_text())
    tensors = load_file(written / WEIGHTS)
    ranks = {min(tensor.shape) for tensor in tensors.values()}
    assert ranks == {config["r"]} and config["lora_alpha"] == config["r"] and not config["use_rslora"]
    assert not config.get("rank_pattern") and not config.get("alpha_pattern")
    assert len(tensors) == len(load_file(original / WEIGHTS)) == 16 and isinstance(config["target_modules"], list)

    theirs = stock_logits(model, original)
    scale = theirs.abs().max()
    for found in (stock_logits(model, written), our_logits(model, written), our_logits(model, original)):
        assert (found - theirs).abs().max() <= 1e-5 * scale  # float32 sums in another order
    seen = updates(written, of_vllm)
    for path, update in updates(written, of_llama_cpp).items():
        assert torch.equal(update, seen[path]) and update.any()


@pytest.mark.parametrize("original", ["plain"], indirect=True)
def test_unreadable_patterns(original):
    path = original / "adapter_config.json"
    for wrong in ({"(": 2}, {"q_proj": "much"}, ["q_proj"]):
        path.write_text(json.dumps({**json.loads(path.read_text()), "alpha_pattern": wrong}))
        with pytest.raises(InputError, match="alpha_pattern"):
            read_adapter(original)


def test_filled_up_ranks_are_not_trained_on():
    factors = {"a": (torch.ones(4, 2), torch.ones(2, 3)), "b": (torch.zeros(4, 1), torch.ones(1, 3))}
    check_alive(factors, "adapter")  # B is zero before training
    with pytest.raises(InputError, match="zeros at b"):
        check_alive(one_rank(factors, lambda path, rank: 1.0)[1], "adapter")


@pytest.mark.parametrize("original", ["patterns"], indirect=True)
def test_a_run_does_not_go_on_from_them(effitrain, tiny_model, original, tmp_path):
    command = ["run", "--model", tiny_model("llama"), "-o", tmp_path / "out"]
    answer = effitrain(*command, "--init-adapter", original, "--lora-r", 5)
    assert answer.code == 2 and "could never learn" in answer.err


def test_what_only_peft_takes_is_said():
    assert not [*for_peft_alone((), None)]
    norms, positions = for_peft_alone(("model.norm.weight",), {"rope_theta": 1.0})
    assert "--to merged" in norms and "--to merged" in positions
