"""Loading: how many threads a model of which size gets."""

import pytest
import torch

from effitrain.model.load import find_base, load_model
from effitrain.planning import recipe


@pytest.mark.parametrize("hidden,variable,threads", [(64, None, 1), (512, None, 2), (64, "2", 2)])
def test_a_small_model_takes_one_thread_unless_told_otherwise(tiny_model, monkeypatch, hidden, variable, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    folder, before = str(tiny_model(layers=1, hidden=hidden)), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        load_model(find_base(folder), recipe(model=folder, quant="none", dtype="fp32"), torch.device("cpu"))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
