"""Loading: how many threads a model of which size gets; a model of the hub whose store is here needs no hub."""

import shutil

import pytest
import torch

from effitrain.core.placement import place
from effitrain.io.checkpoint import open_checkpoint
from effitrain.io.shards import hub_fingerprint
from effitrain.io.store import StoreKey
from effitrain.io.stores import default_store_dir
from effitrain.model.load import find_base, load_model
from effitrain.planning import recipe
from effitrain.stream.build import ensure_store


@pytest.mark.parametrize("hidden,variable,threads", [(64, None, 1), (512, None, 2), (64, "2", 2)])
def test_a_small_model_takes_one_thread_unless_told_otherwise(tiny_model, monkeypatch, hidden, variable, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    folder, before = str(tiny_model(layers=1, hidden=hidden)), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        load_model(find_base(folder), recipe(model=folder, quant="none", dtype="fp32"), torch.device("cpu"))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_a_finished_store_of_the_hub_works_offline(tiny_model, tmp_path, monkeypatch):
    """The small files of its commit are in the hub's cache, the weights in the store alone; and main has moved on."""
    import huggingface_hub.constants

    folder, hub_id, commit = tiny_model("llama", layers=3), "someone/model", "a" * 40
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    repo = tmp_path / "hub" / "models--someone--model"
    shutil.copytree(folder, repo / "snapshots" / commit, ignore=shutil.ignore_patterns("*.safetensors"))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("b" * 40)

    local = find_base(str(folder))
    source = type(local.source)(hub_id, None, local.source.config, None, commit)
    key = StoreKey(hub_id, hub_fingerprint(source), "nf4", "fp32", "cpu", f"{hub_id}@{commit}")
    ensure_store(default_store_dir(), key, local.spec, open_checkpoint(folder))

    base = find_base(hub_id).to_stream()
    assert base.remote is not None and base.remote.revision == commit and base.name == hub_id
    asked, cpu, ids = recipe(model=hub_id, dtype="fp32"), torch.device("cpu"), torch.arange(9)
    streamed, whole = load_model(base, asked, cpu, placement=place(3, 1)), load_model(local, asked, cpu)
    assert torch.equal(streamed(ids, ids, (9,)), whole(ids, ids, (9,)))
