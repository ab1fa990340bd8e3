"""From the hub a store is built file by file: the bytes are those from a folder, with two files on disk at most."""

import json
import shutil

import pytest
import torch

from effitrain.core.errors import InputError
from effitrain.core.presets import find_preset
from effitrain.core.spec import spec_from_config
from effitrain.io.checkpoint import open_checkpoint
from effitrain.io.hub import ModelSource
from effitrain.io.shards import hub_fingerprint, open_on_hub
from effitrain.io.store import StoreKey, verify_store
from effitrain.io.synthetic import SyntheticCheckpoint, shapes_of
from effitrain.io.writer import stream_safetensors
from effitrain.stream.build import ensure_store

COMMIT = "a" * 40
CONFIG = {
    **find_preset("llama-3.2-1b").config,
    "num_hidden_layers": 8, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 300,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """``hub(shards, tied)``: a model on a hub that counts what is fetched, and the folder that the hub has it in."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    home, fetched = tmp_path / "hub", []

    def download(hub_id, name, revision, local_dir):
        assert (hub_id, revision) == ("someone/model", COMMIT)
        if not (home / name).is_file():
            raise EntryNotFoundError("none")
        fetched.append(name)
        local_dir.mkdir(parents=True, exist_ok=True)
        return shutil.copy(home / name, local_dir / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    metadata = type("Metadata", (), {"commit_hash": COMMIT})
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *args, **kwargs: metadata)

    def make(shards=4, tied=False):
        config = {**CONFIG, "tie_word_embeddings": tied}
        weights = SyntheticCheckpoint(shapes_of(spec_from_config(config, "m")), 0, False, torch.bfloat16)
        names, weight_map = weights.names(), {}
        home.mkdir()
        (home / "config.json").write_text(json.dumps(config))
        for number in range(shards):
            part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
            file = f"model-{number}.safetensors" if shards > 1 else "model.safetensors"
            stream_safetensors(
                home / file, {name: (torch.bfloat16, weights.shape(name)) for name in part}, weights.read
            )
            weight_map |= dict.fromkeys(part, file)
        if shards > 1:
            (home / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return ModelSource("someone/model", None, config, None), home, fetched

    return make


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_the_same_store_as_from_a_folder(hub, tmp_path, shards, tied):
    source, home, fetched = hub(shards, tied)
    spec = spec_from_config(source.config, "m")
    remote = open_on_hub(source, tmp_path / "shards")
    key = StoreKey("model", remote.fingerprint(), "nf4", "bf16")
    assert hub_fingerprint(source) == remote.fingerprint()
    most = []

    def count(done, parts):
        most.append(len(list(remote.folder.glob("*.safetensors"))))

    store = ensure_store(tmp_path / "a", key, spec, remote, count)
    local = ensure_store(tmp_path / "b", key, spec, open_checkpoint(home))
    verify_store(store.folder)
    for path in local.folder.rglob("*.*"):
        if path.is_file():
            assert path.read_bytes() == (store.folder / path.relative_to(local.folder)).read_bytes(), path
    files = [name for name in fetched if name.endswith(".safetensors")]
    assert len(files) == shards == len(set(files))
    assert max(most) <= 2 and most[-1] == 0
    remote.close()
    assert not remote.folder.exists()


def test_a_killed_builder_fetches_only_what_it_lacks(hub, tmp_path):
    source, _, fetched = hub(4)
    spec = spec_from_config(source.config, "m")

    def stop(done, parts):
        if done == 6:
            raise KeyboardInterrupt

    key = StoreKey("model", hub_fingerprint(source), "nf4", "bf16")
    with pytest.raises(KeyboardInterrupt):
        ensure_store(tmp_path / "a", key, spec, open_on_hub(source, tmp_path / "shards"), stop)
    before = len(fetched)
    ensure_store(tmp_path / "a", key, spec, open_on_hub(source, tmp_path / "shards"))
    again = [name for name in fetched[before:] if name.endswith(".safetensors")]
    assert "model-0.safetensors" not in again and len(again) <= 3


def test_what_cannot_be_read_is_told(hub, tmp_path):
    source, home, _ = hub(1)
    quantised = {**source.config, "quantization_config": {"quant_method": "gptq"}}
    with pytest.raises(InputError, match="someone/model is quantised by gptq"):
        open_on_hub(ModelSource(source.name, None, quantised, None), tmp_path / "shards")
    (home / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"someone/model has no model.safetensors on the hub"):
        open_on_hub(source, tmp_path / "shards")
