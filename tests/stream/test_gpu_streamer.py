"""Streaming on a card: the bits of the resident step, from pinned, pageable and stored layers, with real overlap."""

from types import SimpleNamespace

import pytest
import torch

from effitrain.core.placement import place
from effitrain.io.checkpoint import open_checkpoint
from effitrain.io.store import StoreKey
from effitrain.model.load import find_base
from effitrain.stream.build import ensure_store
from effitrain.stream.pinned import pinned_empty

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
]
LAYERS, CUDA = 6, torch.device("cuda")
SHAPE = {"layers": LAYERS, "hidden": 256, "heads": 4, "kv_heads": 2, "ffn": 768}


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("resident", [0, 2])
@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_the_bits_of_the_resident_step(tiny_model, trial, micro_batches, quant, slots, resident):
    folder, micro = tiny_model("llama", **SHAPE), micro_batches(3, longest=200)
    expected = trial(folder, None, quant, "bf16", device=CUDA).step(micro)
    streamed = trial(folder, place(LAYERS, resident, slots), quant, "bf16", device=CUDA)
    for at_once in (1, len(micro), 1, 2):
        found = streamed.step(micro, at_once)
        assert len(found) == len(expected) and all(map(torch.equal, found, expected))
    traffic = streamed.decoder.streamer.traffic
    assert traffic.copies and traffic.copy_seconds > 0 and 0 <= traffic.hidden_share <= 1


@pytest.mark.parametrize("tier", ["disk", "pageable"])
def test_staged_layers(tiny_model, trial, micro_batches, tmp_path, monkeypatch, tier):
    if tier == "pageable":
        monkeypatch.setattr(
            "effitrain.stream.host.pinned_empty", lambda shape, dtype, device: torch.empty(shape, dtype=dtype)
        )
    folder, micro = tiny_model("llama", **SHAPE), micro_batches(2, longest=200)
    base, checkpoint = find_base(str(folder)), open_checkpoint(folder)
    key = StoreKey("model", checkpoint.fingerprint(), "nf4", "bf16")
    store = ensure_store(tmp_path, key, base.spec, checkpoint, device=CUDA)
    expected = trial(folder, None, "nf4", "bf16", device=CUDA).step(micro)
    placement = place(LAYERS, 0, 2, disk_layers=LAYERS if tier == "disk" else 0)
    streamed = trial(folder, placement, "nf4", "bf16", source=store, device=CUDA)
    assert len(streamed.decoder.streamer.host.pageable) == (LAYERS if tier == "pageable" else 0)
    for at_once in (1, len(micro)):
        assert all(map(torch.equal, streamed.step(micro, at_once), expected))


def test_no_device_memory_is_asked_for_in_steady_state(tiny_model, trial, micro_batches):
    streamed, micro = (
        trial(tiny_model("llama", **SHAPE), place(LAYERS, 0, 2), "nf4", "bf16", device=CUDA),
        micro_batches(),
    )
    for _ in range(2):
        streamed.step(micro)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["num_device_alloc"]
    for _ in range(3):
        streamed.step(micro)
    assert torch.cuda.memory_stats()["num_device_alloc"] == before


def test_waiting_for_a_slot_is_no_time_of_a_copy(tiny_model, trial):
    """The computation runs far ahead on the host, so a copy is asked for long before its slot is free."""
    streamed = trial(tiny_model("llama", **SHAPE), place(LAYERS, 0, 2), "nf4", "bf16", device=CUDA)
    mover = streamed.decoder.streamer.engine.mover
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    started.record()
    torch.cuda._sleep(200_000_000)  # clock cycles: about a tenth of a second
    ended.record()
    mover.release(0)
    mover.reclaim(0)
    start = mover.mark("copy")
    mover.move(0, 0)
    end = mover.mark("copy")
    torch.cuda.synchronize()
    assert mover.seconds(start, end) < mover.seconds(started, ended) / 4


def test_memory_that_cannot_be_pinned_is_pageable_and_breaks_no_kernel(monkeypatch):
    """CUDA reports a refusal once more, when the next kernel is launched."""
    driver = torch.cuda.cudart()
    refusing = SimpleNamespace(
        cudaError=driver.cudaError,
        cudaHostRegister=lambda address, size, flags: driver.cudaHostUnregister(address),  # of what never was pinned
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: refusing)
    tensor = pinned_empty((1000,), torch.float32, CUDA)
    assert not tensor.is_pinned()
    assert torch.ones(3, device=CUDA).sum().item() == 3


def test_pinned_memory_is_let_go(monkeypatch):
    driver, gone = torch.cuda.cudart(), []
    watching = SimpleNamespace(
        cudaError=driver.cudaError,
        cudaHostRegister=driver.cudaHostRegister,
        cudaHostUnregister=lambda address: gone.append(driver.cudaHostUnregister(address)),
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: watching)
    tensor = pinned_empty((64, 2**20), torch.uint8, CUDA)
    part = tensor[3]
    assert tensor.is_pinned()
    del tensor
    assert not gone and part.is_pinned()
    del part
    assert gone == [driver.cudaError.success]
