"""Reading adapters that other tools wrote, and refusing what is not a plain LoRA."""

import json
import re
import shutil
from functools import partial

import pytest
import torch

from effitrain.adapters.attach import adapters, attach, detach, target_names
from effitrain.adapters.base import AdapterConfig, Clock
from effitrain.adapters.merge import check_fits
from effitrain.adapters.storage import load_into, read_adapter, save_adapter
from effitrain.core.errors import InputError
from effitrain.io.atomic import write_json
from effitrain.model.load import find_base, load_model
from effitrain.planning import recipe

CPU = torch.device("cpu")


@pytest.fixture
def decoder(tiny_model):
    folder = str(tiny_model("llama"))
    return load_model(find_base(folder), recipe(model=folder, quant="none", dtype="fp32"), CPU).eval()


@pytest.fixture
def saved(decoder, tmp_path):
    """A LoRA adapter with random values in ``tmp_path/a``."""
    config = AdapterConfig(r=4)
    modules = attach(decoder, config, Clock())
    factors = {path: tuple(torch.randn_like(f) for f in module.factors()) for path, module in modules.items()}
    save_adapter(tmp_path / "a", factors, config, "base")
    return tmp_path / "a"


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_stock_peft_gives_our_logits(tiny_model, decoder, saved):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    load_into(adapters(decoder), read_adapter(saved), "a")
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model("llama")), saved).eval()
    ids = torch.randint(3, 200, (50,))
    ours = decoder.logits(decoder(ids, torch.arange(50), [50]))
    scale = ours.abs().max()
    torch.testing.assert_close(ours / scale, stock(ids[None]).logits[0] / scale, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_reads_what_peft_wrote(tiny_model, decoder, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model("llama")), config).save_pretrained(tmp_path / "p")
    bundle = read_adapter(tmp_path / "p")
    modules = attach(decoder, bundle.config, Clock())
    load_into(modules, bundle, "p")
    assert len(modules) == 4 and bundle.config.r == 3 and bundle.config.scaling == 5 / 3
    check_fits(decoder.spec, bundle)


def test_detach_gives_the_base_back(decoder, saved):
    ids = torch.arange(3, 20)
    with torch.no_grad():
        load_into(adapters(decoder), read_adapter(saved), "a")
        adapted = decoder(ids, torch.arange(17), [17])
        detach(decoder)
        plain = decoder(ids, torch.arange(17), [17])
    assert not adapters(decoder) and not torch.allclose(adapted, plain)


def test_targets(decoder):
    names = [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
        "lm_head",
    ]
    assert target_names(names, None) == names[:3]
    assert target_names(names, ("q_proj", "lm_head")) == [*names[:2], "lm_head"]
    assert target_names(names, ("1.self_attn.q_proj",)) == names[1:2]
    with pytest.raises(InputError, match="proj_q") as error:
        target_names(names, ("proj_q", "up_proj"))
    assert "q_proj" in error.value.next_step


def _edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "change,word",
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"r": None}, "r or lora_alpha"),
    ],
)
def test_not_a_plain_lora(saved, change, word):
    _edit(saved, **change)
    with pytest.raises(InputError, match=word):
        read_adapter(saved)


def test_damaged_or_missing_files(saved, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        read_adapter(tmp_path / "nowhere")
    weights = saved / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(InputError, match="damaged"):
        read_adapter(saved)
    weights.unlink()
    with pytest.raises(InputError, match=r"adapter_model\.safetensors is missing"):
        read_adapter(saved)
    (saved / "adapter_config.json").write_text("{")
    shutil.copy(__file__, weights)
    with pytest.raises(InputError, match="damaged"):
        read_adapter(saved)


def test_a_run_that_left_a_model_says_so(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    with pytest.raises(InputError, match="or a run folder with one in it"):
        read_adapter(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(InputError, match=rf"--model {re.escape(str(tmp_path / 'model'))}, without --adapter"):
        read_adapter(tmp_path)


def test_an_adapter_of_another_model(tiny_model, decoder, saved):
    other = str(tiny_model("llama", layers=3, ffn=144))
    spec = find_base(other).spec
    bundle = read_adapter(saved)
    with pytest.raises(InputError, match="another model"):
        check_fits(spec, bundle)
    detach(decoder)
    with pytest.raises(InputError, match="does not fit"):
        load_into(attach(decoder, AdapterConfig(r=4, targets=("q_proj",)), Clock()), bundle, "a")
    detach(decoder)
    with pytest.raises(InputError, match="--lora-r 4"):
        load_into(attach(decoder, AdapterConfig(r=8), Clock()), bundle, "a")


def test_an_adapter_of_another_scale_stays_the_same_update(decoder, saved):
    """Going on from an adapter with alpha 8 in a run with alpha 32 starts from what was saved."""
    bundle = read_adapter(saved)
    before = {path: bundle.config.scaling * (B @ A) for path, (B, A) in bundle.tensors.items()}
    detach(decoder)
    for config in (AdapterConfig(r=4, alpha=7), AdapterConfig(r=4, alpha=3, rslora=True)):
        modules = attach(decoder, config, Clock())
        load_into(modules, bundle, "a")
        for path, module in modules.items():
            torch.testing.assert_close(module.delta_weight(), before[path])
        detach(decoder)


def test_an_adapter_is_there_with_its_positions_or_not_at_all(tmp_path, monkeypatch):
    def stopped(path, value):
        if path.name == "config.json":
            raise KeyboardInterrupt
        write_json(path, value)

    factors, positions = {"model.layers.0.mlp.up_proj": (torch.ones(4, 2), torch.ones(2, 4))}, {"rope_theta": 5.0}
    save = partial(save_adapter, tmp_path / "a", factors, AdapterConfig(r=2), "base", positions=positions)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("effitrain.adapters.storage.write_json", stopped)
        save()
    assert not [*tmp_path.iterdir()]
    save()
    assert json.loads((tmp_path / "a/config.json").read_text()) == positions
