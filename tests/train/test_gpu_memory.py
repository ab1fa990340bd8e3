"""The meter and the cap on a real card."""

import pytest
import torch

from effitrain.io.machine import process_device_bytes
from effitrain.train.memory import Meter, cap_memory, cuda_context_bytes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
]
MIB = 2**20


def _block(mib):
    return torch.empty(mib * MIB, dtype=torch.uint8, device="cuda")


def test_the_context_is_a_contexts_size():
    _block(1).sum().item()
    if process_device_bytes() is None:
        pytest.skip("the driver does not count memory by process here")
    assert 50 * MIB < cuda_context_bytes() < 3 * 2**30


def test_what_torch_reserves_is_not_context():
    before = cuda_context_bytes()
    block = _block(600)
    assert abs(cuda_context_bytes() - before) < 100 * MIB
    del block


def test_the_meter_sees_a_peak_that_has_passed():
    meter = Meter(torch.device("cuda"))
    start = meter.peak()
    block = _block(300)
    del block
    peak = meter.peak()
    assert start + 300 * MIB <= peak < start + 340 * MIB
    assert Meter(torch.device("cuda"), meter.context_bytes).peak() < peak - 200 * MIB


def test_the_cap_is_kept():
    torch.cuda.empty_cache()
    context = cuda_context_bytes()
    budget = context + torch.cuda.memory_reserved() + 200 * MIB
    cap_memory(budget, context)
    try:
        inside = _block(150)
        with pytest.raises(torch.OutOfMemoryError):
            _block(150)
        assert Meter(torch.device("cuda"), context).peak() <= budget
        del inside
    finally:
        cap_memory(2**50, 0)
    assert _block(300).is_cuda
