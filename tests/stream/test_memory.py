"""What streaming takes: slots and nothing per layer, nothing new in steady state, and the same on shapes alone."""

from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from effitrain.adapters.attach import attach
from effitrain.adapters.base import AdapterConfig, Clock
from effitrain.core.placement import place
from effitrain.io.synthetic import EmptyCheckpoint, shapes_of
from effitrain.model.decoder import build
from effitrain.model.load import fill, find_base, stream
from effitrain.quant.nf4 import warm_up
from effitrain.stream.fresh import FreshLayers
from effitrain.train.loss import loss_sum
from effitrain.train.memory import StorageTracker, model_tensors


def test_no_storage_is_made_in_steady_state(tiny_model, trial, micro_batches, monkeypatch):
    """Neither by the copying thread nor for weights: every byte of a copy lands in a slot that was there before."""
    streamed = trial(tiny_model("llama", layers=5), place(5, 1, 2))
    streamer = streamed.decoder.streamer
    slots = {slot.data_ptr(): slot.nbytes for slot in streamer.slots}
    views = {id(view) for weights in streamer._views.values() for view in weights.values()}
    for _ in range(2):
        streamed.step(micro_batches())
    tracker, mover = StorageTracker(), streamer.engine.mover
    move = mover.move

    def tracked(layer, slot):
        with tracker:  # a dispatch mode is of one thread: this is the copying one
            return move(layer, slot)

    monkeypatch.setattr(mover, "move", tracked)
    seen = []
    for linears in streamer.linears.values():
        for linear in linears:
            dense = linear.dense
            monkeypatch.setattr(
                linear, "dense", lambda dtype, linear=linear, dense=dense: (seen.append(linear.weight), dense(dtype))[1]
            )
    before = streamer.traffic.copies
    tracker.add([*streamer.slots, *streamer.host.blobs.values()])
    known = tracker.live
    streamed.step(micro_batches())
    assert streamer.traffic.copies > before and tracker.peak == known
    assert seen and {id(weight) for weight in seen} <= views
    assert {slot.data_ptr(): slot.nbytes for slot in streamer.slots} == slots


def measured(folder, layers, resident, slots, batch, symbolic):
    """Bytes of the model without adapters, and the peak of a step, on real data or on shapes alone."""
    base = find_base(str(folder))
    warm_up(torch.device("cpu"))
    placement = place(layers, resident, slots)
    with FakeTensorMode(allow_non_fake_inputs=True) if symbolic else nullcontext():
        weights = EmptyCheckpoint(shapes_of(base.spec), 0, True, torch.float32) if symbolic else base.weights()
        decoder = build(base.spec, base.source.config, "x")
        device = torch.device("cpu")
        fill(decoder, weights, "nf4", torch.float32, device, streamed=placement.streamed)
        stream(decoder, FreshLayers(base.spec, weights, "nf4", "fp32"), placement, device, shapes_only=symbolic)
        decoder.set_recompute("layer")
        names = ("input_ids", "position_ids", "labels", "trained_rows")
        inputs = {name: getattr(batch, name).clone() for name in names}
        batch = replace(batch, **inputs)
        held = model_tensors(decoder)
        attach(decoder, AdapterConfig(r=4), Clock())
        tracker = StorageTracker()
        tracker.add(held)
        frozen = tracker.live
        tracker.add([*model_tensors(decoder), *inputs.values()])
        with tracker:
            loss_sum(decoder, batch).backward()
    return frozen, tracker.peak


@pytest.mark.parametrize(("resident", "slots"), [(0, 1), (0, 3), (2, 2)])
def test_shapes_alone_tell_the_peak(tiny_model, micro_batches, resident, slots):
    batch = micro_batches(1)[0]
    folder = tiny_model("llama", layers=6)
    assert measured(folder, 6, resident, slots, batch, True) == measured(folder, 6, resident, slots, batch, False)


def test_frozen_weights_on_the_device_do_not_grow_with_the_layers(tiny_model, micro_batches):
    batch = micro_batches(1)[0]
    sizes = [measured(tiny_model("llama", layers=n), n, 0, 3, batch, True)[0] for n in (4, 6, 12)]
    norms = 2 * 64 * 4
    assert [b - a for a, b in pairwise(sizes)] == [2 * norms, 6 * norms]
