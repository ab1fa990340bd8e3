"""Checkpoints: resuming repeats the run bit for bit, whatever the optimizer, and damage is named."""

import pytest
import torch
from torch import nn

from effitrain.core.errors import InputError
from effitrain.train.optim import make_optimizer, set_lr
from effitrain.train.schedule import learning_rate
from effitrain.train.state import TrainState, checkpoints, load_checkpoint, snapshot, write_checkpoint


def _toy(name):
    torch.manual_seed(0)
    trainable = {"a": nn.Parameter(torch.randn(70, 100)), "b": nn.Parameter(torch.randn(5, 3))}
    return trainable, make_optimizer(name, trainable.values(), 1e-2, 0.1)


def _steps(trainable, optimizer, numbers):
    for number in numbers:
        source = torch.Generator().manual_seed(number)
        for parameter in trainable.values():
            parameter.grad = torch.randn(parameter.shape, generator=source)
        set_lr(optimizer, learning_rate(number, 10, 1e-2, "cosine", 0.1))
        optimizer.step()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "paged-adamw8bit"])
def test_resuming_is_bit_identical(tmp_path, name):
    trainable, optimizer = _toy(name)
    _steps(trainable, optimizer, range(4))
    state = TrainState(4, 100, 1.5, 3.0, 2.0)
    write_checkpoint(tmp_path, snapshot(state, trainable, optimizer), 2)
    _steps(trainable, optimizer, range(4, 8))

    again, other = _toy(name)
    assert load_checkpoint(tmp_path / "step-4", again, other) == state
    _steps(again, other, range(4, 8))
    assert all(torch.equal(trainable[n], again[n]) for n in trainable)


def test_what_is_large_is_written_without_a_copy_of_it():
    """So the plan's host memory needs no line for it; what is small is copied, and training goes on."""
    trainable, optimizer = _toy("adamw")
    _steps(trainable, optimizer, range(1))
    there = {tensor.data_ptr() for tensor in trainable.values()}
    there |= {tensor.data_ptr() for state in optimizer.state.values() for tensor in state.values()}
    for most in (2**20, 2**10):
        taken = snapshot(TrainState(1), trainable, optimizer, most)
        held = {tensor.data_ptr() for tensor in (*taken.trainable.values(), *taken.optimizer.values())}
        assert taken.own is (most == 2**20) and (held.isdisjoint(there) if taken.own else held == there)


def test_only_the_newest_are_kept(tmp_path):
    trainable, optimizer = _toy("adamw")
    for step in (1, 2, 10, 11):
        write_checkpoint(tmp_path, snapshot(TrainState(step), trainable, optimizer), 2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-10", "step-11"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-10", "step-11"]


@pytest.mark.parametrize("file", ["trainable.safetensors", "optimizer.safetensors", "state.json"])
def test_damage_is_named(tmp_path, file):
    trainable, optimizer = _toy("adamw")
    _steps(trainable, optimizer, range(2))
    folder = write_checkpoint(tmp_path, snapshot(TrainState(2), trainable, optimizer), 2)
    data = bytearray((folder / file).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / file).write_bytes(data)
    with pytest.raises(InputError, match=file.partition(".")[0]):
        load_checkpoint(folder, trainable, optimizer)


def test_checkpoints_of_another_run_are_refused(tmp_path):
    trainable, optimizer = _toy("adamw")
    folder = write_checkpoint(tmp_path, snapshot(TrainState(1), trainable, optimizer), 2)
    other = {"a": nn.Parameter(torch.zeros(2, 2))}
    with pytest.raises(InputError, match="other trainable tensors"):
        load_checkpoint(folder, other, make_optimizer("adamw", other.values(), 1e-3, 0.0))
    with pytest.raises(InputError, match=r"no state\.json"):
        load_checkpoint(tmp_path, trainable, optimizer)


@pytest.mark.parametrize("schedule,end", [("cosine", 0.1), ("linear", 0.0), ("constant", 1.0)])
def test_schedules(schedule, end):
    rates = [learning_rate(step, 200, 1.0, schedule, 0.05) for step in range(200)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and max(rates) == 1.0
    assert rates[-1] == pytest.approx(end, abs=0.01)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert learning_rate(0, 1, 1.0, schedule, 0.0) == 1.0
