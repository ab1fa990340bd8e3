"""A streamed step against the resident one with the same recomputation: the same bits, under any delay, and exactly the
copies of the schedule.
"""

import random
import time
from functools import cache

import pytest
import torch

from effitrain.core.placement import place
from effitrain.stream.engine import Engine
from effitrain.stream.offload import Offload

LAYERS = 5
FAMILIES = ("llama", "mistral", "qwen3", "qwen2")
TARGETS = (None, ("q_proj", "down_proj"), ("lm_head",), ("down_proj", "lm_head"))


def equal(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


@pytest.fixture(scope="module")
def resident(tiny_model, trial, micro_batches):
    """``resident(...)``: folder and result of the resident step."""

    @cache
    def of(family, quant="nf4", targets=None, dropout=0.0, count=3, dtype="fp32"):
        folder = tiny_model(family, layers=LAYERS)
        made = trial(folder, None, quant, dtype, targets=targets, dropout=dropout)
        return folder, made.step(micro_batches(count))

    return of


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_any_number_of_resident_layers(resident, trial, micro_batches, family, slots):
    folder, expected = resident(family)
    assert all(grad.any() for grad in expected)
    for count in range(LAYERS + 1):
        streamed = trial(folder, place(LAYERS, count, slots))
        for at_once in (1, 3):
            assert equal(streamed.step(micro_batches(), at_once), expected)


def seeds(short, long):
    return [pytest.param(range(short), id=f"{short}"), pytest.param(range(long), id=f"{long}", marks=pytest.mark.slow)]


@pytest.mark.parametrize("chosen", seeds(20, 200))
def test_random_models_placements_and_delays(resident, trial, micro_batches, sleepy, chosen):
    for seed in chosen:
        rng = random.Random(seed)
        settings = {
            "family": rng.choice(FAMILIES),
            "quant": rng.choice(["nf4", "none"]),
            "targets": rng.choice(TARGETS),
            "dropout": rng.choice([0.0, 0.2]),
            "count": rng.choice([1, 2, 4]),
            "dtype": rng.choice(["fp32", "bf16"]),
        }
        folder, expected = resident(**settings)
        count = settings.pop("count")
        del settings["family"]
        placement = place(LAYERS, rng.randrange(LAYERS), rng.choice([1, 2, 3]))
        streamed = sleepy(trial(folder, placement, **settings), seed)
        for at_once in (1, rng.choice([2, 3, count]), 1):
            assert equal(streamed.step(micro_batches(count), at_once), expected), (seed, settings, placement, at_once)


def early(engine, copy):
    """A guard broken on purpose: a slot is given away one use too early."""
    return copy.after - 1 <= engine._freed


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_a_slot_released_early_is_caught_and_would_be_wrong(resident, trial, micro_batches, sleepy, monkeypatch, slots):
    folder, expected = resident("llama")
    monkeypatch.setattr(Engine, "_may_begin", early)
    for seed in range(3):
        broken = sleepy(trial(folder, place(LAYERS, 0, slots)), seed)
        with pytest.raises(RuntimeError, match=r"is not ready|was overwritten while in use"):
            broken.step(micro_batches())
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_check", lambda *args: None)
        assert not equal(sleepy(trial(folder, place(LAYERS, 0, slots)), 0).step(micro_batches()), expected)


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 2])
def test_bytes_copied_are_those_of_the_plan(resident, trial, micro_batches, slots, count):
    folder, _ = resident("llama")
    streamed = trial(folder, place(LAYERS, count, slots))
    streamer, S = streamed.decoder.streamer, LAYERS - count
    blob, missing = streamer.host.source.layout(0).nbytes, S - min(S, slots)
    copies = 0
    for step in range(4):
        streamed.step(micro_batches(3))
        copies += 6 * missing if step else S + 5 * missing
        assert (streamer.traffic.copies, streamer.traffic.bytes_copied) == (copies, copies * blob)
        assert streamer.traffic.planned == copies
    for at_once, passes in ((3, 1), (2, 2), (2, 2), (5, 1)):
        streamed.step(micro_batches(3), at_once)
        copies += 2 * passes * missing
        assert streamer.traffic.bytes_copied == copies * blob


@pytest.mark.parametrize("targets", [None, ("down_proj", "lm_head")])
def test_groups_add_up_in_the_order_of_the_micro_batches(resident, trial, micro_batches, targets):
    """(a + b) + (c + d) is not ((a + b) + c) + d in floating point."""
    folder, expected = resident("llama", targets=targets, count=5)
    streamed = trial(folder, place(LAYERS, 1, 2), targets=targets)
    for at_once in (2, 3, 4):
        assert equal(streamed.step(micro_batches(5), at_once), expected), at_once


def test_waiting_for_a_slot_is_no_time_of_a_copy(resident, trial, micro_batches, monkeypatch):
    folder, _ = resident("llama")
    streamed = trial(folder, place(LAYERS, 0, 2))
    monkeypatch.setattr(streamed.decoder.streamer.engine.mover, "reclaim", lambda slot: time.sleep(0.02))
    streamed.step(micro_batches())
    traffic = streamed.decoder.streamer.traffic
    assert traffic.copies and traffic.copy_seconds < traffic.copies * 0.01


def test_weights_are_only_there_while_held(resident, trial):
    folder, _ = resident("llama")
    streamed = trial(folder, place(LAYERS, 1, 2))
    streamer = streamed.decoder.streamer
    layer = next(iter(streamer.linears))
    linear = streamer.linears[layer][0]
    x = torch.randn(1, 3, linear.in_features)
    with pytest.raises(RuntimeError, match="before its weight was loaded"):
        linear.matmul(x)
    streamer.begin_pass()
    with streamer.hold(layer):
        linear.matmul(x)
    with pytest.raises(RuntimeError, match="before its weight was loaded"):
        linear.matmul(x)
    with pytest.raises(RuntimeError, match=f"layer {layer} is used where the schedule has"), streamer.hold(layer):
        pass


def test_what_waits_on_the_host_is_never_written(resident, trial, micro_batches):
    folder, _ = resident("llama")
    streamed = trial(folder, place(LAYERS, 0, 2))
    blobs = streamed.decoder.streamer.host.blobs
    before = {layer: blob.clone() for layer, blob in blobs.items()}
    for blob in blobs.values():
        blob.numpy().flags.writeable = False
    host = streamed.decoder.streamer.host
    streamed.step(micro_batches())
    assert all(torch.equal(before[layer], blob) for layer, blob in blobs.items()) and host.written() == 0
    blobs[2].copy_(streamed.decoder.streamer.slots[0])
    assert host.written() == 1


def test_a_failing_copy_is_told_and_the_next_pass_starts_afresh(resident, trial, micro_batches):
    folder, expected = resident("llama")
    streamed = trial(folder, place(LAYERS, 0, 2))
    mover = streamed.decoder.streamer.engine.mover
    move, calls = mover.move, []

    def failing(layer, slot):
        calls.append(layer)
        if len(calls) == 4:
            raise OSError("the disk is gone")
        return move(layer, slot)

    mover.move = failing
    with pytest.raises(OSError, match="the disk is gone"):
        streamed.step(micro_batches())
    assert equal(streamed.step(micro_batches()), expected)


def test_asking_for_the_counts_in_the_middle_of_a_step_changes_nothing(resident, trial, micro_batches, sleepy):
    folder, expected = resident("llama")
    streamed = sleepy(trial(folder, place(LAYERS, 0, 2)), 1)
    streamer, seen = streamed.decoder.streamer, []
    for layer in streamed.decoder.layers:
        layer.register_forward_pre_hook(lambda *args: seen.append(streamer.traffic.copies))
    assert equal(streamed.step(micro_batches()), expected)
    assert seen == sorted(seen) and seen[0] < seen[-1] <= streamer.traffic.copies


def test_a_step_that_stops_half_way_leaves_no_trace(resident, trial, micro_batches):
    folder, expected = resident("llama")
    streamed = trial(folder, place(LAYERS, 1, 2))
    layer = streamed.decoder.layers[3]
    handle = layer.register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        streamed.step(micro_batches())
    handle.remove()
    assert equal(streamed.step(micro_batches()), expected)


def test_evaluation_streams_too(resident, trial, micro_batches):
    folder, _ = resident("llama")
    whole, streamed = trial(folder), trial(folder, place(LAYERS, 1, 2))
    batch = micro_batches()[0]
    with torch.no_grad():
        a, b = (t.decoder.eval()(batch.input_ids, batch.position_ids, batch.segments) for t in (whole, streamed))
    assert torch.equal(a, b)


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_a_real_model(data_dir, trial, micro_batches, sleepy, slots, quant):
    folder = data_dir / "models" / "stories3M"
    whole = trial(folder, None, quant)
    layers, batches = len(whole.decoder.layers), micro_batches(2, vocab=100)
    expected = whole.step(batches)
    for count in range(0, layers, 2):
        streamed = sleepy(trial(folder, place(layers, count, slots), quant), count)
        for at_once in (1, 2):
            assert equal(streamed.step(batches, at_once), expected)


def test_layer_inputs_may_wait_on_the_host_too(resident, trial, micro_batches):
    folder, expected = resident("llama")
    micro = micro_batches()
    tokens = max(len(batch.input_ids) for batch in micro)
    for at_once in (1, 2, 3):
        streamed = trial(folder, place(LAYERS, 1, 2))
        streamed.decoder.offload = Offload(
            LAYERS * at_once, tokens, streamed.decoder.spec.hidden, torch.float32, torch.device("cpu")
        )
        for _ in range(2):
            assert equal(streamed.step(micro, at_once), expected)


def test_norms_and_mlps_in_tiles(resident, trial, micro_batches):
    folder, whole = resident("llama")
    tiled = trial(folder)
    tiled.decoder.set_tile(7)
    expected = tiled.step(micro_batches())
    assert all((a - b).abs().max() <= 1e-5 * b.abs().max() for a, b in zip(expected, whole, strict=True))
    for count in (0, 2):
        streamed = trial(folder, place(LAYERS, count, 2))
        streamed.decoder.set_tile(7)
        for at_once in (1, 3):
            assert equal(streamed.step(micro_batches(), at_once), expected)


@pytest.mark.parametrize("slots", [1, 3])
def test_a_layer_that_comes_back_in_another_form_is_not_mistaken_for_the_old_one(tiny_model, trial, slots):
    """One streamed layer, so that its slot still holds the old bytes when the new ones are put in their place."""
    from effitrain.core.layout import layer_layout
    from effitrain.io.blob import views
    from effitrain.model.load import frozen_linears

    made = trial(tiny_model("llama", layers=LAYERS), place(LAYERS, LAYERS - 1, slots), "none")
    decoder = made.decoder
    streamer = decoder.streamer
    (layer,) = streamer.linears
    linears = frozen_linears(decoder.layers[layer])

    def held() -> torch.Tensor:
        streamer.begin_pass()
        with streamer.hold(layer):
            return linears[0].weight.clone()

    before = held()
    streamer.rest(layer)
    assert layer not in streamer and streamer.resting == {layer}
    layout = layer_layout(decoder.spec.layers[layer], lambda linear: "bf16")
    blob = torch.zeros(layout.nbytes, dtype=torch.uint8)
    views(blob, layout)[linears[0].spec.name].fill_(2.5)
    streamer.host.put(layer, layout, blob, torch.device("cpu"))
    streamer.wake(layer, linears)
    after = held()
    assert before.dtype == torch.float32 and not (before == 2.5).any()
    assert after.dtype == torch.bfloat16 and (after == 2.5).all() and not streamer.resting
