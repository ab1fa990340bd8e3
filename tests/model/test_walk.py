"""Walking through a model in the same arrangement of threads as loading it whole."""

import pytest
import torch

from effitrain.model.decoder import build
from effitrain.model.load import find_base
from effitrain.model.walk import Walk

CPU = torch.device("cpu")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("told", "threads"), [(None, 1), ("2", 2)])
def test_a_small_model_is_walked_through_on_one_thread(tiny_model, monkeypatch, two_threads, told, threads):
    """Scores and alignment once took all cores before training and one after it: the small model then depended on
    whether the process had trained before.
    """
    if told:
        monkeypatch.setenv("OMP_NUM_THREADS", told)
    else:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    base = find_base(str(tiny_model())).fetched()
    Walk(build(base.spec, base.source.config, base.name), base.weights(), "none", torch.float32, CPU)
    assert torch.get_num_threads() == threads
