"""A store is there whole, says what it is, and names what is wrong with it."""

import json
from itertools import pairwise

import pytest
import torch

from effitrain.core.errors import InputError
from effitrain.core.layout import NF4, layer_layout
from effitrain.io.blob import parts_of, views, write_blob
from effitrain.io.checkpoint import open_checkpoint
from effitrain.io.store import StoreKey, find_store, open_store, remove_store, verify_store
from effitrain.io.stores import list_stores
from effitrain.model.load import find_base
from effitrain.quant.nf4 import quantize
from effitrain.stream.build import ensure_store


@pytest.fixture
def built(tiny_model, tmp_path):
    """``built(family, quant, dtype)``: a store in ``tmp_path``, and the checkpoint it was made from."""

    def make(family="llama", quant="nf4", dtype="fp32"):
        base = find_base(str(tiny_model(family)))
        checkpoint = open_checkpoint(base.source.folder)
        key = StoreKey(base.name, checkpoint.fingerprint(), quant, dtype)
        return ensure_store(tmp_path, key, base.spec, checkpoint), checkpoint

    return make


@pytest.mark.parametrize("form", ["nf4", "bf16", "fp32"])
def test_a_blob_is_its_weights(tiny_model, tmp_path, form):
    spec = find_base(str(tiny_model("qwen2", hidden=48, heads=3, kv_heads=1, ffn=100))).spec
    layout = layer_layout(spec.layers[0], lambda name: form)
    dtype = {"bf16": torch.bfloat16}.get(form, torch.float32)
    weights = {field.name: torch.randn(field.shape, dtype=dtype) for field in layout.fields}
    if form == NF4:
        weights = {name: quantize(weight) for name, weight in weights.items()}
    write_blob(tmp_path / "blob", layout, lambda field: weights[field.name])
    content = (tmp_path / "blob").read_bytes()
    assert len(content) == layout.nbytes and layout.nbytes % 4096 == 0
    found = views(torch.frombuffer(bytearray(content), dtype=torch.uint8), layout)
    for name, weight in weights.items():
        for a, b in zip(parts_of(found[name]), parts_of(weight), strict=True):
            assert torch.equal(a, b) and a.data_ptr() % 16 == 0 and a.shape == b.shape
    parts = sorted((part for field in layout.fields for part in field.parts), key=lambda part: part.start)
    assert all(a.start + a.nbytes <= b.start and b.start % 256 == 0 for a, b in pairwise(parts))
    with pytest.raises(ValueError, match="the layout says"):
        write_blob(tmp_path / "other", layout, lambda field: torch.zeros(3))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(("quant", "dtype"), [("nf4", "fp32"), ("nf4", "bf16"), ("none", "bf16")])
def test_a_store_gives_what_the_checkpoint_gives(built, family, quant, dtype):
    store, checkpoint = built(family, quant, dtype)
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    for name in checkpoint.names():
        assert store.has(name)
        full = checkpoint.read(name)
        if name.endswith("_proj.weight"):
            expected = quantize(full.to(torch_dtype)) if quant == "nf4" else full.to(torch_dtype)
            found = store.read_nf4(name) if quant == "nf4" else store.read(name)
            assert store.is_nf4(name) == (quant == "nf4")
            assert all(map(torch.equal, parts_of(found), parts_of(expected)))
        else:
            assert torch.equal(store.read(name), full) and not store.is_nf4(name)
    assert store.fingerprint() == checkpoint.fingerprint() and not store.has("model.layers.9.mlp.up_proj.weight")
    blob = torch.empty(store.layout(1).nbytes, dtype=torch.uint8)
    store.read_ahead(1)
    store.read_into(1, blob)
    assert blob.numpy().tobytes() == (store.folder / "layers/001.bin").read_bytes()


def test_it_is_found_again_listed_and_removed(built, tmp_path):
    store, _ = built()
    assert find_store(tmp_path, store.key) == store and built()[0] == store
    other = StoreKey(store.key.name, store.key.source, "nf4", "bf16")
    assert find_store(tmp_path, other) is None and len({other.folder, store.key.folder}) == 2
    assert list_stores(tmp_path) == [store.folder]
    verify_store(store.folder)
    remove_store(store.folder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["layers/001.bin", "layers/001.safetensors", "embedding.safetensors", "head.safetensors", "store.json"]
)
def test_a_flipped_byte_is_named(built, name):
    store, _ = built()
    path = store.folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=path.name) as caught:
        verify_store(store.folder)
    assert f"effitrain store rm {store.folder.name}" in caught.value.next_step


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "layers/001.bin").unlink(), "layer 1"),
        (lambda f: (f / "layers/000.bin").write_bytes(b"short"), "layer 0"),
        (lambda f: (f / "head.safetensors").unlink(), "head.safetensors is missing"),
        (lambda f: (f / "layers/001.safetensors").unlink(), "001.safetensors is missing"),
        (lambda f: (f / "store.json").unlink(), "no store.json"),
        (lambda f: (f / "store.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "store.json").write_text('{"version": 0}'), "version 0"),
    ],
)
def test_a_damaged_store_is_refused(built, damage, words):
    store, _ = built()
    damage(store.folder)
    with pytest.raises(InputError, match=words):
        open_store(store.folder)


def test_a_file_cut_off_while_in_use_is_told(built):
    store, _ = built()
    path = store.folder / "layers/000.bin"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"000.bin ended 9 bytes early") as caught:
        store.read_into(0, torch.empty(store.layout(0).nbytes, dtype=torch.uint8))
    names_the_store(caught.value, store)
    assert "Layer 0" in caught.value.fact


@pytest.mark.parametrize("name", ["head.safetensors", "layers/001.safetensors", "embedding.safetensors"])
def test_a_small_file_cut_off_is_damage_of_the_store_and_of_no_download(built, name):
    store, _ = built()
    path = store.folder / name
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=path.name) as caught:
        open_store(store.folder).read("model.norm.weight")
    names_the_store(caught.value, store)


def names_the_store(error, store):
    assert f"The store {store.folder.name} is damaged" in error.fact and "download" not in str(error)
    assert f"effitrain store verify {store.folder.name}" in error.next_step
    assert f"effitrain store rm {store.folder.name}" in error.next_step


def test_layers_of_one_shape_are_described_once(built):
    store, _ = built()
    about = json.loads((store.folder / "store.json").read_text())
    assert len(about["layouts"]) == 1 and about["layers"] == [0, 0]
