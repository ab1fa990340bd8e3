"""Tensors are read as they are stored, under canonical names, whatever the checkpoint's make."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from effitrain.core.errors import InputError
from effitrain.io.checkpoint import open_checkpoint

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def copy_of(folder, target):
    """A copy that a test may change, and its tensors."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    return target, load_file(target / "model.safetensors")


def rewrite(folder, tensors, **config):
    save_file(tensors, folder / "model.safetensors")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **config}))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma"])
def test_every_tensor_of_every_family(family, tiny_model):
    folder = tiny_model(family)
    checkpoint, expected = open_checkpoint(folder), load_file(folder / "model.safetensors")
    assert sorted(checkpoint.names()) == sorted(expected)
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.read(name), tensor) and checkpoint.has(name) and not checkpoint.is_nf4(name)
        assert (checkpoint.shape(name), checkpoint.dtype(name)) == (tuple(tensor.shape), tensor.dtype)


def test_shards(tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = tiny_model("llama")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    sharded, single = open_checkpoint(tmp_path), open_checkpoint(folder)
    assert sorted(sharded.names()) == sorted(single.names())
    assert all(torch.equal(sharded.read(name), single.read(name)) for name in single.names())


def test_a_tensor_owns_its_memory(tiny_model):
    checkpoint = open_checkpoint(tiny_model("llama"))
    tensor = checkpoint.read("model.norm.weight")
    assert tensor.untyped_storage().nbytes() == tensor.nbytes
    tensor.zero_()
    assert checkpoint.read("model.norm.weight").any()


def test_no_file_stays_open(tiny_model):
    import os

    before = os.listdir("/proc/self/fd")
    checkpoint = open_checkpoint(tiny_model("llama"))
    tensors = [checkpoint.read(name) for name in checkpoint.names()]
    assert len(os.listdir("/proc/self/fd")) == len(before) and tensors


def test_device(tiny_model):
    assert open_checkpoint(tiny_model("llama")).read(HEAD, "meta").is_meta


@pytest.mark.parametrize("stored", [EMBEDDING, HEAD])
def test_tied_table_answers_to_both_names(stored, tiny_model, tmp_path):
    folder, tensors = copy_of(tiny_model("llama", tied=True), tmp_path)
    table = tensors.pop(EMBEDDING)
    rewrite(folder, {**tensors, stored: table})
    checkpoint = open_checkpoint(folder)
    assert EMBEDDING in checkpoint.names() and HEAD not in checkpoint.names()
    for name in (EMBEDDING, HEAD):
        assert checkpoint.has(name) and torch.equal(checkpoint.read(name), table)
        assert checkpoint.shape(name) == tuple(table.shape) and checkpoint.dtype(name) == table.dtype


def test_tied_table_stored_twice(tiny_model, tmp_path):
    folder, tensors = copy_of(tiny_model("llama", tied=True), tmp_path)
    rewrite(folder, {**tensors, HEAD: tensors[EMBEDDING].clone()})
    assert HEAD not in open_checkpoint(folder).names()


@pytest.mark.parametrize("change", [lambda t: t + 1, lambda t: t[:-1].clone(), lambda t: t.half()])
def test_tied_by_config_and_different_in_the_file(change, tiny_model, tmp_path):
    folder, tensors = copy_of(tiny_model("llama", tied=True), tmp_path)
    rewrite(folder, {**tensors, HEAD: change(tensors[EMBEDDING])})
    with pytest.raises(InputError, match=r'differ.*\n.*"tie_word_embeddings": false'):
        open_checkpoint(folder)


def test_untied_head_is_not_borrowed(tiny_model, tmp_path):
    folder, tensors = copy_of(tiny_model("llama"), tmp_path)
    del tensors[HEAD]
    rewrite(folder, tensors)
    checkpoint = open_checkpoint(folder)
    assert not checkpoint.has(HEAD)
    with pytest.raises(InputError, match=rf"holds no tensor {HEAD}. It holds 20 tensors: model.embed_tokens.weight, "):
        checkpoint.read(HEAD)


def test_names_without_prefix_and_computed_tables(tiny_model, tmp_path):
    folder, tensors = copy_of(tiny_model("llama"), tmp_path)
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    rewrite(folder, {**bare, "layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    checkpoint = open_checkpoint(folder)
    assert sorted(checkpoint.names()) == sorted(tensors)
    assert all(torch.equal(checkpoint.read(name), tensors[name]) for name in tensors)


def test_file_without_tensors(tiny_model, tmp_path):
    folder, _ = copy_of(tiny_model("llama"), tmp_path)
    save_file({}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"hold no tensor; on disk: config.json"):
        open_checkpoint(folder)


def test_unhandled_dtype(tiny_model, tmp_path):
    folder, tensors = copy_of(tiny_model("llama"), tmp_path)
    rewrite(folder, {**tensors, HEAD: tensors[HEAD].to(torch.float8_e4m3fn)})
    with pytest.raises(InputError, match=r"lm_head.weight is stored in F8_E4M3, .*\n.*16-bit model"):
        open_checkpoint(folder).read(HEAD)


def test_sizes_that_contradict_the_shape(tmp_path, tiny_model):
    folder, _ = copy_of(tiny_model("llama"), tmp_path)
    header = json.dumps({"norm.weight": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(InputError, match=r"damaged: model.norm.weight takes 8 bytes, not \(3,\) values"):
        open_checkpoint(folder).read("model.norm.weight")


def test_file_that_shrinks_or_goes_while_in_use(tiny_model, tmp_path):
    folder, tensors = copy_of(tiny_model("llama"), tmp_path)
    checkpoint = open_checkpoint(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"ended .* bytes early"):
        [checkpoint.read(name) for name in tensors]
    path.unlink()
    with pytest.raises(InputError, match="cannot be read: No such file"):
        checkpoint.read(HEAD)


def test_fingerprint_follows_content_and_not_place(tiny_model, tmp_path):
    folder, tensors = copy_of(tiny_model("llama"), tmp_path)
    original = open_checkpoint(tiny_model("llama")).fingerprint()
    assert open_checkpoint(folder).fingerprint() == original
    tensors["model.layers.1.mlp.up_proj.weight"] += 1  # a fine-tune: same names, shapes and sizes
    rewrite(folder, tensors)
    assert open_checkpoint(folder).fingerprint() != original


def nf4_model(folder, source, **options):
    """``source`` quantised and saved by transformers; its linears by name."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, **options}
    config = BitsAndBytesConfig(load_in_4bit=True, **options)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    model.save_pretrained(folder)
    return {f"{name}.weight": module for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}


def test_nf4_as_transformers_saves_it(tiny_model, tmp_path):
    source = tiny_model("llama", hidden=128, ffn=200)
    linears = nf4_model(tmp_path, source)
    checkpoint, dense = open_checkpoint(tmp_path), open_checkpoint(source)
    assert sorted(checkpoint.names()) == sorted(dense.names())
    assert {name for name in checkpoint.names() if checkpoint.is_nf4(name)} == set(linears) and len(linears) == 14
    for name, module in linears.items():
        weight, state = checkpoint.read_nf4(name), module.weight.quant_state
        assert torch.equal(weight.packed, module.weight.data) and torch.equal(weight.absmax, state.absmax)
        assert torch.equal(weight.nested_absmax, state.state2.absmax) and torch.equal(weight.offset, state.offset)
        assert weight.shape == checkpoint.shape(name) == dense.shape(name)
        assert checkpoint.dtype(name) == torch.float32
    for name in set(checkpoint.names()) - set(linears):
        assert torch.equal(checkpoint.read(name), dense.read(name))


def test_nf4_weight_is_not_read_as_a_plain_one(tiny_model, tmp_path):
    name = next(iter(nf4_model(tmp_path, tiny_model("llama"))))
    with pytest.raises(InputError, match="is stored in NF4"):
        open_checkpoint(tmp_path).read(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bnb_4bit_use_double_quant": False}, "in NF4 without double quantisation"),
        ({"bnb_4bit_quant_type": "fp4"}, "quantised to fp4 by bitsandbytes"),
    ],
)
def test_other_4_bit_checkpoints_are_refused_on_opening(options, message, tiny_model, tmp_path):
    nf4_model(tmp_path, tiny_model("llama"), **options)
    with pytest.raises(InputError, match=message) as error:
        open_checkpoint(tmp_path)
    assert "original 16-bit model" in error.value.next_step


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "is quantised by gptq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "quantised to int8 by bitsandbytes"),
        ({"load_in_4bit": True}, "quantised to fp4 by bitsandbytes"),
        ({"bits": 4}, "is quantised by a method unknown"),
    ],
)
def test_other_quantisations_are_refused_on_opening(config, message, tiny_model, tmp_path):
    folder, tensors = copy_of(tiny_model("llama"), tmp_path)
    rewrite(folder, tensors, quantization_config=config)
    with pytest.raises(InputError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["stories260K", "stories3M", "tinystories656K", "babyllama105"])
def test_real_models(name, data_dir):
    folder = data_dir / "models" / name
    checkpoint, stored = open_checkpoint(folder), load_file(folder / "model.safetensors")
    table = stored.pop(EMBEDDING) if EMBEDDING in stored else stored.pop(HEAD)
    assert sorted(checkpoint.names()) == sorted([EMBEDDING, *stored])
    assert torch.equal(checkpoint.read(EMBEDDING), table) and torch.equal(checkpoint.read(HEAD), table)
    assert all(torch.equal(checkpoint.read(key), stored[key]) for key in stored)
    assert len(checkpoint.fingerprint()) == 64
