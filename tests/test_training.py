"""What is watched while a run trains."""

import torch

from effitrain import training
from effitrain.training import StreamWatch


def test_requests_for_memory_are_those_of_steps_that_find_every_buffer_there(monkeypatch):
    asked = 0
    monkeypatch.setattr(training, "device_allocations", lambda device: asked)
    watch = StreamWatch(None, None, torch.device("cuda"))
    for step in range(1, 6):
        watch.before_step(None)
        asked += 100 if step <= training.WARM_STEPS else step
        watch.after_step(None, None)
        asked += 1000  # an evaluation, and a checkpoint
    assert watch.asked == 3 + 4 + 5


def test_nothing_is_counted_on_a_cpu():
    watch = StreamWatch(None, None, torch.device("cpu"))
    for _ in range(4):
        watch.before_step(None)
        watch.after_step(None, None)
    assert watch.asked is None
