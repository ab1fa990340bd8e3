"""Training on a card: recomputation repeats the forward pass, optimizers work and resume, losses follow the CPU's."""

import numpy as np
import pytest
import torch
from samples import random_samples

from effitrain.adapters.attach import attach
from effitrain.adapters.base import AdapterConfig, Clock
from effitrain.data.batches import Batches
from effitrain.model.load import DTYPES, find_base, load_model
from effitrain.planning import recipe
from effitrain.stream.offload import Offload
from effitrain.train.hooks import Hook
from effitrain.train.loop import Course, accumulate, train
from effitrain.train.memory import Meter
from effitrain.train.optim import make_optimizer
from effitrain.train.probe import probe
from effitrain.train.state import TrainState, load_checkpoint, snapshot, write_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# bitsandbytes keeps states of less than 4,096 numbers in 32 bits, and pages those of 100,000 and more.
OPTIMIZERS = [("adamw", 4), ("adamw8bit", 64), ("paged-adamw8bit", 1024)]


def _model(folder, device=CUDA, dtype="fp32", quant="none", dropout=0.0, r=4):
    asked = recipe(model=str(folder), quant=quant, dtype=dtype)
    decoder, clock = load_model(find_base(str(folder)), asked, device), Clock(1)
    attach(decoder, AdapterConfig(r=r, dropout=dropout), clock)
    return decoder, clock, {n: p for n, p in decoder.named_parameters() if p.requires_grad}


class Losses(Hook):
    def __init__(self):
        self.values = []

    def after_step(self, state, record):
        self.values.append(record.loss)


def _train(decoder, clock, optimizer, steps=8, start=0):
    losses, batches = Losses(), Batches(random_samples(32), 4, 64, False, 3)
    course = Course(steps, steps * 2, 2, 3e-3)
    train(decoder, batches, optimizer, course, TrainState(step=start), clock, [losses])
    return losses.values


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-3), ("bf16", 5e-2)])
def test_the_losses_of_the_cpu(tiny_model, dtype, tolerance):
    curves = []
    for device, kind in ((CPU, "fp32"), (CUDA, dtype)):
        decoder, clock, trainable = _model(tiny_model("llama"), device, kind)
        curves.append(_train(decoder, clock, make_optimizer("adamw", trainable.values(), 3e-3, 0.0)))
    np.testing.assert_allclose(curves[1], curves[0], rtol=tolerance)
    assert all(p.is_cuda and p.dtype == torch.float32 for p in trainable.values())


@pytest.mark.parametrize("quant", ["none", "nf4"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-4), ("bf16", 3e-2)])
def test_recomputation_repeats_dropout(tiny_model, quant, dtype, tolerance):
    """Another mask in the second forward pass would give other gradients; backward kernels may sum in any order."""
    batch = Batches(random_samples(6), 6, 64, False, 0).get(0)
    losses, grads = [], []
    for recompute in ("none", "mlp", "layer", "offload"):
        decoder, clock, trainable = _model(tiny_model("llama"), CUDA, dtype, quant, dropout=0.3)
        decoder.set_recompute("layer" if recompute == "offload" else recompute)
        if recompute == "offload":
            decoder.offload = Offload(
                len(decoder.layers), len(batch.input_ids), decoder.spec.hidden, DTYPES[dtype], CUDA
            )
        with torch.no_grad():
            for parameter in trainable.values():
                parameter += 0.02
        clock.step = 5
        losses.append(accumulate(decoder, [batch], clock, list(trainable.values())))
        grads.append([p.grad for p in trainable.values()])
    assert len(set(losses)) == 1
    for plain, recomputed in ((a, b) for other in grads[1:] for a, b in zip(grads[0], other, strict=True)):
        assert plain.any() and (plain - recomputed).abs().max() <= tolerance * plain.abs().max()


def test_dropout_differs_between_steps(tiny_model):
    decoder, clock, trainable = _model(tiny_model("llama"), dropout=0.3)
    with torch.no_grad():
        for parameter in trainable.values():
            parameter += 0.02
    batch = Batches(random_samples(6), 6, 64, False, 0).get(0)
    losses = []
    for clock.step in (0, 1, 0):
        losses.append(accumulate(decoder, [batch], clock))
    assert losses[0] == losses[2] != losses[1]


@pytest.mark.parametrize(("name", "rank"), OPTIMIZERS)
def test_optimizers_learn_and_the_probe_leaves_no_trace(tiny_model, name, rank):
    curves = []
    for probing in (False, True):
        decoder, clock, trainable = _model(tiny_model("llama"), quant="nf4", dtype="bf16", r=rank)
        optimizer = make_optimizer(name, trainable.values(), 3e-3, 0.0)
        if probing:
            before = {n: p.detach().clone() for n, p in trainable.items()}
            meter = Meter(CUDA)
            probe(decoder, [Batches(random_samples(32), 4, 64, False, 3).longest], optimizer, clock, meter)
            assert all(torch.equal(p, before[n]) for n, p in trainable.items()) and not optimizer.state
            assert meter.peak() > sum(p.nbytes for p in trainable.values())
        curves.append(_train(decoder, clock, optimizer, steps=16))
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-2)
    assert np.mean(curves[1][-4:]) < 0.95 * np.mean(curves[1][:4])  # four steps see every sample once


@pytest.mark.parametrize(("name", "rank"), OPTIMIZERS)
def test_a_checkpoint_brings_everything_back(tiny_model, tmp_path, name, rank):
    decoder, clock, trainable = _model(tiny_model("llama"), r=rank)
    optimizer = make_optimizer(name, trainable.values(), 3e-3, 0.0)
    _train(decoder, clock, optimizer, steps=3)
    folder = write_checkpoint(tmp_path, snapshot(TrainState(3), trainable, optimizer), 2)
    again, clock_again, trainable_again = _model(tiny_model("llama"), r=rank)
    resumed = make_optimizer(name, trainable_again.values(), 3e-3, 0.0)
    load_checkpoint(folder, trainable_again, resumed)
    assert all(p.is_cuda and torch.equal(p, trainable[n]) for n, p in trainable_again.items())
    rest = _train(decoder, clock, optimizer, steps=6, start=3)
    np.testing.assert_allclose(_train(again, clock_again, resumed, steps=6, start=3), rest, rtol=1e-3)
