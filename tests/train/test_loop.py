"""The loop against plain PyTorch on stock transformers and peft, and against itself cut into other micro-batches."""

import math

import numpy as np
import pytest
import torch
from samples import random_samples

from effitrain.adapters.attach import attach
from effitrain.adapters.base import AdapterConfig, Clock
from effitrain.adapters.storage import load_into, read_adapter, save_adapter
from effitrain.core.errors import InputError
from effitrain.data.batches import Batches, MicroBatch
from effitrain.model.load import find_base, load_model
from effitrain.planning import recipe
from effitrain.train.hooks import Hook
from effitrain.train.loop import Course, accumulate, train
from effitrain.train.loss import loss_sum
from effitrain.train.memory import Meter
from effitrain.train.optim import make_optimizer
from effitrain.train.probe import probe
from effitrain.train.state import TrainState

CPU = torch.device("cpu")


def _decoder(folder, config=AdapterConfig(r=4), seed=1, **fields):  # noqa: B008  (frozen)
    asked = recipe(model=str(folder), quant=fields.pop("quant", "none"), dtype="fp32", **fields)
    decoder = load_model(find_base(str(folder)), asked, CPU)
    clock = Clock(seed)
    return decoder, attach(decoder, config, clock), clock


def _parameters(decoder):
    return [p for p in decoder.parameters() if p.requires_grad]


class Losses(Hook):
    def __init__(self):
        self.values = []

    def after_step(self, state, record):
        self.values.append(record.loss)


def _train(decoder, clock, tokens, steps, batch_size, accum, packing=False, **course):
    optimizer = make_optimizer("adamw", _parameters(decoder), 1e-3, 0.0)
    losses, batches = Losses(), Batches(tokens, batch_size, 64, packing, 3)
    train(
        decoder, batches, optimizer, Course(steps, steps * accum, accum, 1e-3, **course), TrainState(), clock, [losses]
    )
    return losses.values


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("batch_size,accum", [(8, 1), (2, 4)])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_thirty_steps_of_a_plain_peft_loop(tiny_model, tmp_path, family, batch_size, accum):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, tokens, config = tiny_model(family), random_samples(64), AdapterConfig(r=4, alpha=8)
    decoder, modules, clock = _decoder(folder, config)
    save_adapter(tmp_path / "start", {n: m.factors() for n, m in modules.items()}, config, str(folder))
    ours = _train(decoder, clock, tokens, 30, batch_size, accum)

    base = AutoModelForCausalLM.from_pretrained(folder)
    model = PeftModel.from_pretrained(base, tmp_path / "start", is_trainable=True)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer, batches, theirs = (
        torch.optim.AdamW(trainable, weight_decay=0.0),
        Batches(tokens, batch_size, 64, False, 3),
        [],
    )
    for step in range(30):
        rising = math.ceil(0.03 * 30)
        done = (step - rising) / (30 - rising)
        lr = 1e-3 * ((step + 1) / rising if step < rising else 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)
        rows = [row for i in range(accum) for row in _rows(batches.get(step * accum + i))]
        trained = sum(int((labels[1:] != -100).sum()) for _, labels in rows)
        total = sum(
            model(input_ids=ids[None], labels=labels[None]).loss * (labels[1:] != -100).sum() for ids, labels in rows
        )
        (total / trained).backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        theirs.append(total.item() / trained)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    assert len(set(ours)) == 30


def _rows(batch: MicroBatch):
    """Each sample of a micro-batch with transformers' unshifted labels."""
    labels = torch.cat([torch.tensor([-100]), batch.labels[:-1]])
    return zip(batch.input_ids.split(batch.segments), labels.split(batch.segments), strict=True)


@pytest.mark.parametrize("recompute", [False, True])
def test_one_batch_of_eight_is_eight_of_one(tiny_model, recompute):
    tokens = random_samples(24)
    curves = []
    for batch_size, accum in ((8, 1), (1, 8)):
        decoder, _, clock = _decoder(tiny_model("llama"))
        decoder.set_recompute("layer" if recompute else "none")
        curves.append(_train(decoder, clock, tokens, 6, batch_size, accum))
    np.testing.assert_allclose(*curves, rtol=1e-5)
    assert len(set(curves[0])) == 6


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_packed_and_unpacked_losses_agree(tiny_model, quant):
    tokens = random_samples(40)
    decoder, _, _ = _decoder(tiny_model("llama"), quant=quant)
    sums = []
    for packing in (False, True):
        batches = Batches(tokens, 4, 64, packing, 3)
        found = [batches.get(i) for i in range(batches.per_epoch)]
        with torch.no_grad():
            sums.append(sum(loss_sum(decoder, b).item() for b in found) / sum(b.trained_tokens for b in found))
    assert batches.per_epoch < 10 and sums[0] == pytest.approx(sums[1], rel=1e-5)


@pytest.mark.parametrize("targets", [None, ("q_proj",), ("lm_head",), ("down_proj", "lm_head")])
def test_recomputation_changes_no_gradient(tiny_model, targets):
    batch = Batches(random_samples(6), 6, 64, False, 0).get(0)
    grads = []
    for recompute in ("none", "mlp", "layer"):
        decoder, _, clock = _decoder(tiny_model("llama"), AdapterConfig(r=4, dropout=0.2, targets=targets))
        decoder.set_recompute(recompute)
        with torch.no_grad():
            for parameter in _parameters(decoder):
                parameter += 0.02
        clock.step = 5
        accumulate(decoder, [batch], clock, _parameters(decoder))
        grads.append([p.grad for p in _parameters(decoder)])
    for other in grads[1:]:
        assert all(torch.equal(a, b) and a.any() for a, b in zip(grads[0], other, strict=True))


def test_the_last_step_may_be_short_and_epochs_differ(tiny_model):
    tokens = random_samples(10)
    decoder, _, clock = _decoder(tiny_model("llama"))
    batches = Batches(tokens, 1, 64, False, 3)
    seen, original = [], batches.get
    batches.get = lambda i: seen.append(i) or original(i)
    optimizer = make_optimizer("adamw", _parameters(decoder), 1e-3, 0.0)
    train(decoder, batches, optimizer, Course(3, 10, 4, 1e-3), TrainState(), clock)
    assert seen == list(range(10))
    order = [[original(e * 10 + i).input_ids.tolist() for i in range(10)] for e in range(2)]
    assert order[0] != order[1] and sorted(order[0]) == sorted(order[1])


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_stops_at_the_first_value_that_is_not_finite(tiny_model, what):
    decoder, modules, clock = _decoder(tiny_model("llama"))
    tokens, adapter = random_samples(8), next(iter(modules.values()))

    class Damage(Hook):
        def before_step(self, state):
            if state.step == 1 and what == "loss":
                adapter.B.data.fill_(float("nan"))
            if state.step == 1 and what == "gradient":
                adapter.B.register_hook(lambda grad: grad * float("inf"))

    optimizer = make_optimizer("adamw", _parameters(decoder), 1e-3, 0.0)
    with pytest.raises(InputError, match=r"step 2.*not finite|step 2, micro-batch 1 of 2, is nan"):
        train(
            decoder, Batches(tokens, 2, 64, False, 0), optimizer, Course(4, 8, 2, 1e-3), TrainState(), clock, [Damage()]
        )


@pytest.mark.parametrize("optimizer_name", ["adamw", "adamw8bit"])
def test_the_probe_leaves_no_trace(tiny_model, optimizer_name):
    tokens, curves = random_samples(16), []
    for probing in (False, True):
        decoder, _, clock = _decoder(tiny_model("llama"))
        optimizer = make_optimizer(optimizer_name, _parameters(decoder), 1e-3, 0.1)
        batches, losses, meter = Batches(tokens, 4, 64, False, 0), Losses(), Meter(CPU)
        if probing:
            before = [p.clone() for p in _parameters(decoder)]
            probe(decoder, [batches.longest], optimizer, clock, meter)
            assert all(torch.equal(a, b) for a, b in zip(before, _parameters(decoder), strict=True))
            assert meter.peak() > 0 and not optimizer.state
        train(decoder, batches, optimizer, Course(4, 4, 1, 1e-3), TrainState(), clock, [losses])
        curves.append(losses.values)
    assert curves[0] == curves[1]


def test_bf16_follows_fp32(tiny_model):
    tokens = random_samples(32)
    decoder, _, clock = _decoder(tiny_model("llama"))
    exact = _train(decoder, clock, tokens, 10, 4, 1)
    asked = recipe(model=str(tiny_model("llama")), quant="none", dtype="bf16")
    half = load_model(find_base(asked.model), asked, CPU)
    attach(half, AdapterConfig(r=4), Clock(1))
    np.testing.assert_allclose(_train(half, Clock(1), tokens, 10, 4, 1), exact, rtol=0.03)


def test_an_adapter_to_go_on_from_is_where_training_starts(tiny_model, tmp_path):
    tokens, config = random_samples(16), AdapterConfig(r=4)
    decoder, modules, clock = _decoder(tiny_model("llama"))
    _train(decoder, clock, tokens, 3, 4, 1)
    save_adapter(tmp_path / "a", {n: m.factors() for n, m in modules.items()}, config, "base")
    again, fresh, _ = _decoder(tiny_model("llama"))
    load_into(fresh, read_adapter(tmp_path / "a"), "a")
    batch = Batches(tokens, 4, 64, False, 3).get(0)
    assert loss_sum(again, batch).item() == loss_sum(decoder, batch).item()
