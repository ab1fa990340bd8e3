"""Gated activations against their reference: bit for bit on the CPU; the kernels and their gradients in float64."""

import pytest
import torch

from effitrain.kernels.swiglu import gated_backward, reference, swiglu

TOLERANCES = [(torch.float32, 2e-6), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)]
SHAPES = [(1,), (3, 7), (2, 5, 129)]
interpreter = pytest.mark.interpreter
both = pytest.mark.parametrize("activation", ["silu", "gelu"])


def _case(shape, dtype):
    return (2 * torch.randn(shape, dtype=torch.float32).to(dtype) for _ in range(3))


def _exact(gate, up, grad, activation):
    inputs = gate.detach().double().requires_grad_(), up.detach().double().requires_grad_()
    out = reference(*inputs, activation)
    return out, *torch.autograd.grad(out, inputs, grad.double())


@both
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bit_for_bit(plain, shape, dtype, activation):
    gate, up, grad = _case(shape, dtype)
    results = []
    for function in (swiglu, reference):
        inputs = gate.clone().requires_grad_(), up.clone().requires_grad_()
        out = function(*inputs, activation)
        results.append((out, *torch.autograd.grad(out, inputs, grad)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@both
def test_gradients(plain, activation):
    gate, up = (torch.randn(4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda gate, up: swiglu(gate, up, activation), (gate, up))


def _keeps_two_tensors():
    gate, up = (torch.randn(4, 5, requires_grad=True) for _ in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        swiglu(gate, up)
    assert sorted(kept) == sorted([gate.data_ptr(), up.data_ptr()])


def test_keeps_two_tensors(plain):
    _keeps_two_tensors()


@interpreter
def test_kernel_keeps_two_tensors():
    _keeps_two_tensors()


@interpreter
@both
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 1024)])
def test_kernel(close, shape, dtype, tolerance, activation):
    gate, up, grad = _case(shape, dtype)
    gate.requires_grad_(), up.requires_grad_()
    out = swiglu(gate, up, activation)
    found = out, *torch.autograd.grad(out, (gate, up), grad)
    assert [t.dtype for t in found] == [dtype] * 3
    for value, wanted in zip(found, _exact(gate, up, grad, activation), strict=True):
        close(value, wanted, tolerance)


@interpreter
@both
def test_results_take_the_places_of_the_inputs(close, activation):
    gate, up, grad = _case((3, 700), torch.float32)
    wanted = _exact(gate, up, grad, activation)
    gated_backward(grad, gate, up, gate, up, grad, activation)
    for value, want in zip((grad, gate, up), wanted, strict=True):
        close(value, want, 2e-6)


@interpreter
@both
def test_large_values(close, activation):
    gate, up, grad = torch.tensor([-1e4, -90.0, -20.0, 0.0, 20.0, 1e4]).requires_grad_(), torch.ones(6), torch.ones(6)
    out = swiglu(gate, up, activation)
    for value, want in zip(
        (out, *torch.autograd.grad(out, gate, grad)), _exact(gate, up, grad, activation)[:2], strict=True
    ):
        close(value, want, 2e-6)


@interpreter
def test_views_are_read_right(close):
    gate, up, grad = (torch.randn(7, 6).t() for _ in range(3))
    gate.requires_grad_(), up.requires_grad_()
    out = swiglu(gate, up)
    for value, want in zip(
        (out, *torch.autograd.grad(out, (gate, up), grad)), _exact(gate, up, grad, "silu"), strict=True
    ):
        close(value, want, 2e-6)
