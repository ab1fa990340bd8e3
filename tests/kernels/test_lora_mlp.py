"""The gated MLP as one function against the reference in float64; what it keeps; that backward runs once."""

import pytest
import torch

from effitrain.kernels.lora_linear import Linear
from effitrain.kernels.lora_mlp import lora_mlp, reference

HIDDEN, FFN = 64, 112
interpreter = pytest.mark.interpreter


def _linears(lora, adapted="gud", quantised=True, kind="none", tokens=1, **fields):
    shapes = {"g": (FFN, HIDDEN), "u": (FFN, HIDDEN), "d": (HIDDEN, FFN)}
    return [
        Linear(lora.frozen(*shape, quantised), lora.update(*shape, 4, kind, tokens, **fields) if n in adapted else None)
        for n, shape in shapes.items()
    ]


@interpreter
@pytest.mark.parametrize(
    ("dtype", "adapted", "activation"),
    [
        *((torch.float32, adapted, "silu") for adapted in ("gud", "gd", "u", "")),
        *((dtype, "gud", "gelu") for dtype in (torch.float32, torch.float16, torch.bfloat16)),
    ],
)
def test_kernel(lora, dtype, adapted, activation):
    x = torch.randn(2, 7, HIDDEN).to(dtype).requires_grad_()
    linears = _linears(lora, adapted)
    lora.check(
        x, linears, lambda x, parts: lora_mlp(x, *parts, activation), lambda x, parts: reference(x, *parts, activation)
    )


@interpreter
@pytest.mark.parametrize("kind", ["diagonal", "square", "gate"])
def test_mids_and_dropout(lora, kind):
    x = torch.randn(11, HIDDEN, requires_grad=True)
    linears = _linears(lora, "gud", False, kind, 11, dropout=0.3, seed=5)
    lora.check(x, linears, lambda x, parts: lora_mlp(x, *parts), lambda x, parts: reference(x, *parts))


@interpreter
def test_a_first_layer_needs_no_input_gradient(lora, close):
    x, linears = torch.randn(11, HIDDEN), _linears(lora)
    tensors = [t for linear in linears for t in linear.tensors if t is not None]
    found = torch.autograd.grad(lora_mlp(x, *linears).sum(), tensors)
    wanted = torch.autograd.grad(reference(x, *linears).sum(), tensors)
    for a, b in zip(found, wanted, strict=True):
        close(a, b, 1e-5)  # two sums in float32


@interpreter
def test_keeps_two_wide_tensors(lora):
    x, kept = torch.randn(11, HIDDEN, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        lora_mlp(x, *_linears(lora))
    assert sorted(kept) == sorted([x.nbytes] + 2 * [11 * FFN * 4] + 3 * [11 * 4 * 4])


@interpreter
def test_a_second_backward_is_an_error(lora):
    x = torch.randn(11, HIDDEN, requires_grad=True)
    y = lora_mlp(x, *_linears(lora)).sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@interpreter
def test_a_value_that_nobody_reads(lora):
    x, linears = torch.randn(6, HIDDEN, requires_grad=True), _linears(lora)
    inputs, grad = [x, *(t for linear in linears for t in linear.tensors if t is not None)], torch.randn(6, HIDDEN)
    wanted = torch.autograd.grad(lora_mlp(x, *linears), inputs, grad)
    with linears[2].base.value_unused():
        y = lora_mlp(x, *linears)
    assert not y.any()
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(y, inputs, grad), wanted, strict=True))


def test_without_kernels(plain, lora):
    x, linears = torch.randn(6, HIDDEN), _linears(lora, "gd")
    assert torch.equal(lora_mlp(x, *linears), reference(x, *linears))
