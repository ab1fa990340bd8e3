"""The storage tracker counts what is alive, once; a card's bytes outside the allocator; the cap that keeps a budget."""

import pytest
import torch

from effitrain.io.machine import Card
from effitrain.train import memory
from effitrain.train.memory import Meter, StorageTracker, cap_memory, cuda_context_bytes, model_tensors


def test_peak_counts_live_storages_once():
    kept = torch.zeros(1000)
    tracker = StorageTracker()
    tracker.add([kept, kept[:10]])
    assert tracker.live == 4000
    with tracker:
        a = torch.ones(500)
        b = a.view(5, 100)[1:]
        c = a + 1
        del a, b
        d = c * 2
        del c, d
    assert tracker.live == 4000 and tracker.peak == 4000 + 3 * 2000 - 2000


def test_frozen_weights_are_found(tiny_model):
    from effitrain.model.load import find_base, load_model
    from effitrain.planning import recipe

    folder = str(tiny_model("llama"))
    decoder = load_model(find_base(folder), recipe(model=folder, dtype="fp32"), torch.device("cpu"))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model_tensors(decoder)}
    q = decoder.layers[0].self_attn.q_proj.weight
    assert q.packed.data_ptr() in storages and decoder.lm_head.weight.data_ptr() in storages
    nf4 = sum(n.spec.weights for n in decoder.modules() if hasattr(n, "spec") and hasattr(n, "in_features")) / 2
    assert sum(storages.values()) > nf4


MIB = 2**20


@pytest.fixture
def fake_card(monkeypatch):
    """A card of 1000 MiB with 700 MiB free; torch reserved 250 MiB at the peak and 200 MiB now. The capped shares."""
    shares = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (700 * MIB, 1000 * MIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 200 * MIB)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 250 * MIB)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    return shares


@pytest.mark.parametrize(
    ("held", "before", "context"),
    [
        (280, 999, 80),  # the driver counts this process
        (None, 990, 90),  # it does not: what the card lost since before
        (5, 990, 90),  # the same number in another container: less than torch alone has reserved
        (None, None, 100),
        (None, 850, 0),  # another program left meanwhile
    ],
)
def test_bytes_outside_the_allocator(monkeypatch, fake_card, held, before, context):
    monkeypatch.setattr(memory, "process_device_bytes", lambda: held and held * MIB)
    monkeypatch.setattr(memory, "card", lambda: before and Card("card", 1000 * MIB, before * MIB))
    assert cuda_context_bytes() == context * MIB


def test_the_meter_adds_what_it_measured_once(monkeypatch, fake_card):
    answers = iter([50 * MIB])
    monkeypatch.setattr(memory, "cuda_context_bytes", lambda: next(answers))
    meter = Meter(torch.device("cuda"))
    assert meter.context_bytes is None
    assert [meter.peak(), meter.peak()] == [300 * MIB, 300 * MIB]
    assert Meter(torch.device("cuda"), 10 * MIB).peak() == 260 * MIB


@pytest.mark.parametrize(("budget", "context", "share"), [(600, 100, 0.5), (2000, 100, 1.0), (50, 100, 0.0)])
def test_the_cap_is_the_budget_less_the_context(fake_card, budget, context, share):
    cap_memory(budget * MIB, context * MIB)
    assert fake_card == [share]


def test_on_a_cpu_the_peak_is_the_trackers():
    meter = Meter(torch.device("cpu"))
    with meter.tracker:
        torch.zeros(1000)
    assert meter.peak() == 4000
