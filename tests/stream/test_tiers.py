"""Layers in host memory, on disk and in both give the same step; the disk tier takes no host memory for them."""

import pytest
import torch

from effitrain.core.placement import place
from effitrain.io.checkpoint import open_checkpoint
from effitrain.io.store import StoreKey
from effitrain.model.load import find_base
from effitrain.stream.build import ensure_store

LAYERS = 6


@pytest.fixture(scope="module")
def stored(tiny_model, tmp_path_factory):
    """The folder of a model and its store."""
    folder = tiny_model("qwen3", layers=LAYERS)
    base, checkpoint = find_base(str(folder)), open_checkpoint(folder)
    key = StoreKey("model", checkpoint.fingerprint(), "nf4", "fp32")
    return folder, ensure_store(tmp_path_factory.mktemp("stores"), key, base.spec, checkpoint)


@pytest.mark.parametrize("resident", [0, 2])
@pytest.mark.parametrize("disk", [0, 2, 4])
def test_every_tier_gives_the_resident_step(stored, trial, micro_batches, sleepy, resident, disk):
    folder, store = stored
    expected = trial(folder).step(micro_batches())
    placement = place(LAYERS, resident, slots=2, disk_layers=disk)
    streamed = sleepy(trial(folder, placement, source=store), disk)
    for at_once in (1, 2, 3):
        assert all(map(torch.equal, streamed.step(micro_batches(), at_once), expected))
    host = streamed.decoder.streamer.host
    assert set(host.blobs) == set(placement.in_host_memory)
    assert sum(blob.nbytes for blob in host.blobs.values()) == (LAYERS - resident - disk) * store.layout(0).nbytes


def test_layers_on_disk_are_read_ahead_in_the_order_of_the_copies(stored, trial, micro_batches, monkeypatch):
    folder, store = stored
    asked, read = [], []
    monkeypatch.setattr(type(store), "read_ahead", lambda self, layer: asked.append(layer))
    original = type(store).read_into
    monkeypatch.setattr(
        type(store), "read_into", lambda self, layer, target: (read.append(layer), original(self, layer, target))
    )
    streamed = trial(folder, place(LAYERS, 0, 2, disk_layers=LAYERS), source=store)
    streamed.step(micro_batches(1))
    assert len(read) == LAYERS + LAYERS - 2
    assert asked == read[1:]


def test_a_store_that_breaks_while_training_is_told(stored, trial, micro_batches, tmp_path):
    import shutil
    from dataclasses import replace

    from effitrain.core.errors import InputError

    folder, store = stored
    copy = replace(store, folder=tmp_path / "copy")
    shutil.copytree(store.folder, copy.folder)
    streamed = trial(folder, place(LAYERS, 0, 2, disk_layers=LAYERS), source=copy)
    streamed.step(micro_batches())
    path = copy.folder / "layers/003.bin"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"003.bin ended"):
        streamed.step(micro_batches())
