"""Checkpoints are written beside training: of the step they were taken at, one at a time, and no failure is lost."""

import threading

import pytest
import torch
from torch import nn

from effitrain.core.errors import InputError, Interrupted
from effitrain.train import hooks
from effitrain.train.hooks import Checkpoints, StepRecord, StopOnSignal
from effitrain.train.optim import make_optimizer
from effitrain.train.state import TrainState, checkpoints, load_checkpoint

RECORD = StepRecord(1, 0.0, 0.0, 0.0, 0, 0.0, 0)


@pytest.fixture
def toy():
    """A parameter, and its optimizer with states."""
    weight = nn.Parameter(torch.randn(3, 5))
    optimizer = make_optimizer("adamw", [weight], 1e-2, 0.0)
    step(weight, optimizer)
    return weight, optimizer


def step(weight, optimizer):
    weight.grad = torch.randn(weight.shape)
    optimizer.step()


@pytest.fixture
def gate(monkeypatch):
    """Nothing is written before this event is set."""
    opened, write = threading.Event(), hooks.write_checkpoint

    def late(*args):
        assert opened.wait(20)
        return write(*args)

    monkeypatch.setattr(hooks, "write_checkpoint", late)
    return opened


def saver(folder, weight, optimizer, every=1):
    return Checkpoints(folder, {"w": weight}, optimizer, every, keep=2, steps=4)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, toy, gate):
    weight, optimizer = toy
    kept, states = weight.detach().clone(), {name: t.clone() for name, t in optimizer.state[weight].items()}
    with saver(tmp_path, *toy) as saving:
        state = TrainState(1, round_bytes=[7])
        saving.after_step(state, RECORD)
        assert not checkpoints(tmp_path)
        step(weight, optimizer)
        state.step, state.round_bytes[:] = 2, [8]
        gate.set()
    again = nn.Parameter(torch.zeros(3, 5))
    resumed = make_optimizer("adamw", [again], 1e-2, 0.0)
    assert load_checkpoint(tmp_path / "step-1", {"w": again}, resumed) == TrainState(1, round_bytes=[7])
    assert torch.equal(again, kept) and not torch.equal(again, weight)
    assert all(torch.equal(resumed.state[again][name], state) for name, state in states.items())


def test_one_at_a_time(tmp_path, toy, gate):
    threading.Timer(0.2, gate.set).start()
    with saver(tmp_path, *toy) as saving:
        saving.after_step(TrainState(1), RECORD)
        saving.after_step(TrainState(2), RECORD)
        assert [path.name for path in checkpoints(tmp_path)][:1] == ["step-1"]
    assert [path.name for path in checkpoints(tmp_path)] == ["step-1", "step-2"]


def test_what_is_too_large_for_a_copy_is_written_first(tmp_path, toy, monkeypatch):
    taken, take = [], hooks.snapshot
    monkeypatch.setattr(hooks, "snapshot", lambda *args: taken.append(take(*args)) or taken[-1])
    size = 3 * 15 * 4 + 4  # the weight, its moments, their step
    for limit in (size, size - 1):
        monkeypatch.setattr(hooks, "BESIDE_BYTES", limit)
        with saver(tmp_path / str(limit), *toy) as saving:
            saving.save(TrainState(1))
            assert limit == size or checkpoints(tmp_path / str(limit))
    weight = toy[0]
    assert [one.own for one in taken] == [True, False]
    assert [one.trainable["w"].data_ptr() == weight.data_ptr() for one in taken] == [False, True]


@pytest.mark.parametrize("every", [1, 3])
def test_a_failed_write_is_told_at_a_later_step_and_then_forgotten(tmp_path, toy, every):
    """``every`` 1: when the next is due; 3: at a step that saves nothing."""
    (tmp_path / "file").touch()
    with saver(tmp_path / "file", *toy, every) as saving:
        saving.after_step(TrainState(3), RECORD)
        with pytest.raises(InputError, match="cannot be written"):
            for _ in range(10**6):
                saving.after_step(TrainState(5), RECORD)


def test_a_failed_last_write_is_told_at_the_end(tmp_path, toy):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"), saver(tmp_path / "file", *toy) as saving:
        saving.after_step(TrainState(4), RECORD)


def test_another_error_is_not_hidden_by_a_failed_write(tmp_path, toy):
    (tmp_path / "file").touch()
    with pytest.raises(ZeroDivisionError), saver(tmp_path / "file", *toy) as saving:
        saving.save(TrainState(1))
        raise ZeroDivisionError


def test_who_is_stopped_has_the_checkpoint_on_the_disk(tmp_path, toy, gate):
    threading.Timer(0.2, gate.set).start()
    with pytest.raises(Interrupted, match=r"saved .*step-3"), saver(tmp_path, *toy) as saving:
        stop = StopOnSignal(saving)
        stop.asked = True
        try:
            stop.after_step(TrainState(3), RECORD)
        finally:
            assert [path.name for path in checkpoints(tmp_path)] == ["step-3"]
