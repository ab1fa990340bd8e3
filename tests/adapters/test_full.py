"""Norms and embedding trained in full: what is trained, saved so that stock peft gives our logits, merged, refused."""

import pytest
import torch

from effitrain.adapters.attach import adapters, attach
from effitrain.adapters.base import AdapterConfig, Clock
from effitrain.adapters.full import load_in_full, train_in_full, trained_in_full
from effitrain.adapters.merge import check_fits, merge
from effitrain.adapters.storage import load_into, read_adapter, save_adapter
from effitrain.core.errors import InputError
from effitrain.core.paths import EMBEDDING
from effitrain.io.checkpoint import open_checkpoint
from effitrain.io.model_folder import read_config
from effitrain.model.load import find_base, load_model
from effitrain.planning import recipe

CONFIG = AdapterConfig(r=3, alpha=5)
FAMILIES = ["llama", "qwen3", "gemma", "mistral"]


def loaded(folder, dtype="fp32"):
    asked = recipe(model=str(folder), quant="none", dtype=dtype)
    return load_model(find_base(str(folder)), asked, torch.device("cpu"))


@torch.no_grad()
def logits(decoder, ids):
    return decoder.eval().logits(decoder(ids, torch.arange(len(ids)), [len(ids)]))


@pytest.fixture(params=[("llama", False), ("llama", True), ("qwen3", False), ("gemma", True)], ids=str)
def changed(request, tiny_model, tmp_path):
    """A model with a random adapter, norms and embedding; the folder of its base and that of what was saved."""
    folder = tiny_model(*request.param)
    decoder = loaded(folder)
    attach(decoder, CONFIG, Clock())
    train_in_full(decoder, True, True)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    factors = {path: adapter.factors() for path, adapter in adapters(decoder).items()}
    save_adapter(tmp_path / "a", factors, CONFIG, str(folder), full=trained_in_full(decoder))
    return folder, decoder, tmp_path / "a"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_norm_and_the_embedding_are_trained_and_nothing_else(tiny_model, family):
    decoder = loaded(tiny_model(family), "bf16")
    assert not [name for name, p in decoder.named_parameters() if p.requires_grad]
    before = logits(decoder, torch.arange(3, 30))
    train_in_full(decoder, True, True)
    trained = {name for name, p in decoder.named_parameters() if p.requires_grad}
    assert trained == set(trained_in_full(decoder)) == {n for n, _ in decoder.named_parameters()}
    assert (
        EMBEDDING in trained
        and "model.norm.weight" in trained
        and len(trained) == 2 + 2 * (4 if family == "qwen3" else 2)
    )
    assert {p.dtype for p in trained_in_full(decoder).values()} == {torch.float32}
    assert torch.equal(logits(decoder, torch.arange(3, 30)), before)  # float32 copies of bf16 weights are exact
    assert decoder.train()(torch.arange(3, 30), torch.arange(27), [27]).dtype == torch.bfloat16


def test_gradients_of_norms_and_rows_are_those_of_stock_transformers(tiny_model):
    """float32 sums in another order: 1e-4 of the largest gradient."""
    from transformers import AutoModelForCausalLM

    folder = tiny_model("qwen3")
    decoder, ids = loaded(folder), torch.randint(3, 200, (24,))
    train_in_full(decoder, True, True)
    decoder.logits(decoder(ids, torch.arange(24), [24])).square().mean().backward()
    stock = AutoModelForCausalLM.from_pretrained(folder)
    stock(ids[None]).logits.square().mean().backward()
    theirs = dict(stock.named_parameters())
    for name, mine in trained_in_full(decoder).items():
        grad = mine.grad.to_dense() if mine.grad.is_sparse else mine.grad
        scale = theirs[name].grad.abs().max()
        torch.testing.assert_close(grad / scale, theirs[name].grad / scale, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_stock_peft_loads_all_of_it(changed):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, decoder, saved = changed
    ids = torch.randint(3, 200, (40,))
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), saved).eval()
    ours, theirs = logits(decoder, ids), stock(ids[None]).logits[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * ours.abs().max().item())


def test_what_was_saved_is_what_is_loaded(changed):
    folder, decoder, saved = changed
    ids, bundle = torch.randint(3, 200, (40,)), read_adapter(saved)
    assert set(bundle.full) == set(trained_in_full(decoder))
    fresh = loaded(folder)
    load_into(attach(fresh, bundle.config, Clock()), bundle, "a")
    assert not torch.equal(logits(fresh, ids), logits(decoder, ids))
    load_in_full(fresh, bundle.full)
    assert torch.equal(logits(fresh, ids), logits(decoder, ids))
    assert not [name for name in bundle.full if dict(fresh.named_parameters()).get(name) is None and name != EMBEDDING]
    trainable = loaded(folder)
    load_into(attach(trainable, bundle.config, Clock()), bundle, "a")
    train_in_full(trainable, True, True)
    load_in_full(trainable, bundle.full)
    assert torch.equal(logits(trainable, ids), logits(decoder, ids))


@torch.no_grad()
def test_merged_it_is_the_same_model_and_an_embedding_tied_to_the_head_is_untied(changed, tmp_path):
    from transformers import AutoModelForCausalLM

    folder, decoder, saved = changed
    weights, target = open_checkpoint(folder), tmp_path / "merged"
    merge(folder, weights, read_adapter(saved), target, read_config(folder), torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    assert not stock.config.tie_word_embeddings
    ids = torch.randint(3, 200, (40,))
    ours = logits(decoder, ids)
    torch.testing.assert_close(ours, stock(ids[None]).logits[0], rtol=0, atol=1e-5 * ours.abs().max().item())


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.norm.weight", (3,)),
        ("model.layers.9.input_layernorm.weight", (64,)),
        ("model.layers.0.self_attn.q_norm.weight", (16,)),
        (EMBEDDING, (10, 64)),
        ("model.layers.x.input_layernorm.weight", (64,)),
    ],
)
def test_tensors_of_another_model_are_refused(tiny_model, tmp_path, name, shape):
    decoder = loaded(tiny_model("llama"))
    factors = {path: adapter.factors() for path, adapter in attach(decoder, CONFIG, Clock()).items()}
    save_adapter(tmp_path / "a", factors, CONFIG, "base", full={name: torch.zeros(shape)})
    with pytest.raises(InputError, match="trained on another model"):
        check_fits(decoder.spec, read_adapter(tmp_path / "a"))
    with pytest.raises(InputError, match="trained on another model"):
        load_in_full(decoder, {name: torch.zeros(shape)})


@pytest.mark.filterwarnings("ignore")
def test_reads_what_peft_saves_of_norms_and_refuses_other_modules(tiny_model, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    for modules, fine in ((["norm", "input_layernorm", "embed_tokens"], True), (["lm_head"], False)):
        config = LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=modules)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model("llama")), config)
        model.save_pretrained(tmp_path / modules[0])
        if fine:
            check_fits(loaded(tiny_model("llama")).spec, bundle := read_adapter(tmp_path / modules[0]))
            assert EMBEDDING in bundle.full and "model.layers.1.input_layernorm.weight" in bundle.full
        else:
            with pytest.raises(InputError, match="modules_to_save names lm_head"):
                read_adapter(tmp_path / modules[0])
