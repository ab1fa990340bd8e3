"""SwiGLU against its reference: bit for bit, in float64 by finite differences, and what is kept."""

import pytest
import torch

from effitrain.kernels.swiglu import reference, swiglu


@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 5, 129)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bit_for_bit(shape, dtype):
    gate, up, grad = (torch.randn(shape, dtype=dtype) for _ in range(3))
    results = []
    for function in (swiglu, reference):
        inputs = gate.clone().requires_grad_(), up.clone().requires_grad_()
        out = function(*inputs)
        results.append((out, *torch.autograd.grad(out, inputs, grad)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradients():
    gate, up = (torch.randn(4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(swiglu, (gate, up))


def test_keeps_two_tensors():
    gate, up = (torch.randn(4, 5, requires_grad=True) for _ in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        swiglu(gate, up)
    assert sorted(kept) == sorted([gate.data_ptr(), up.data_ptr()])
