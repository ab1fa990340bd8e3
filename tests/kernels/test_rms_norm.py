"""RMS norm: the reference as transformers has it, the kernel and its gradients against float64, what is kept."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from effitrain.kernels import rms_norm as room
from effitrain.kernels.rms_norm import rms_norm

# Sums of up to 300 products in float32; halves round once, and the interpreter chops bfloat16 instead of rounding it.
TOLERANCES = [(torch.float32, 2e-6), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)]
SHAPES = [(1, 5), (1, 64), (5, 48), (2, 3, 300), (2, 7, 3, 16), (70, 33)]
interpreter = pytest.mark.interpreter


def _case(shape, dtype):
    x = (3 * torch.randn(shape)).to(dtype).requires_grad_()
    return x, torch.randn(shape[-1]).to(dtype).requires_grad_(), torch.randn(shape).to(dtype)


def _exact(x, weight, grad, eps):
    x, weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    y = weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return y, *torch.autograd.grad(y, (x, weight), grad.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_is_transformers(plain, dtype):
    x, weight, grad = _case((2, 7, 48), dtype)
    stock = LlamaRMSNorm(48, eps=1e-5)
    stock.weight = torch.nn.Parameter(weight.detach().clone())
    ours, theirs = rms_norm(x, weight, 1e-5), stock(x)
    assert torch.equal(ours, theirs)
    for a, b in zip(
        torch.autograd.grad(ours, (x, weight), grad), torch.autograd.grad(theirs, (x, stock.weight), grad), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", SHAPES)
def test_under_a_frozen_weight(plain, close, shape):
    """The reference's value, and the formula's gradient."""
    x, weight, grad = _case(shape, torch.float32)
    y = rms_norm(x, weight.detach(), 1e-3)
    assert torch.equal(y, room.reference(x, weight, 1e-3)) and y.grad_fn.name() == "_FrozenBackward"
    close(torch.autograd.grad(y, x, grad)[0], _exact(x, weight, grad, 1e-3)[1], 2e-6)


@interpreter
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel(close, shape, dtype, tolerance):
    x, weight, grad = _case(shape, dtype)
    y = rms_norm(x, weight, 1e-3)
    assert y.grad_fn.name() == "_RMSNormBackward" and y.dtype == dtype
    found = y, *torch.autograd.grad(y, (x, weight), grad)
    for value, wanted in zip(found, _exact(x, weight, grad, 1e-3), strict=True):
        close(value, wanted, tolerance)


@interpreter
def test_more_rows_than_shares(close, monkeypatch):
    monkeypatch.setattr(room, "SHARES", 3)
    monkeypatch.setattr(room, "TILE", 64)
    x, weight, grad = _case((23, 16), torch.float32)
    found = torch.autograd.grad(rms_norm(x, weight, 1e-5), (x, weight), grad)
    for value, wanted in zip(found, _exact(x, weight, grad, 1e-5)[1:], strict=True):
        close(value, wanted, 2e-6)


@interpreter
def test_a_frozen_weight_and_a_view(close):
    whole = torch.randn(6, 40)
    x, weight, grad = whole[:, 4:20].requires_grad_(), torch.randn(16), torch.randn(16, 6).t()
    (found,) = torch.autograd.grad(rms_norm(x, weight, 1e-5), x, grad)
    close(found, _exact(x, weight, grad, 1e-5)[1], 2e-6)


@interpreter
def test_keeps_the_input_and_a_number_a_row():
    x, weight, _ = _case((5, 48), torch.float16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rms_norm(x, weight, 1e-5)
    assert sum(t.nbytes for t in kept) == x.nbytes + weight.nbytes + 5 * 4


def test_other_dtypes_and_nothing_at_all():
    assert rms_norm(torch.empty(0, 8), torch.ones(8), 1e-5).shape == (0, 8)
    x = torch.randn(3, 8, dtype=torch.float64)
    assert rms_norm(x, torch.ones(8, dtype=torch.float64), 1e-5).grad_fn is None
    assert rms_norm(x.bfloat16(), torch.ones(8), 1e-5).dtype == torch.float32  # a trained norm keeps its precision
