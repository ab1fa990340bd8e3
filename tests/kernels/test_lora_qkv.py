"""Queries, keys and values as one function against the reference in float64."""

import pytest
import torch

from effitrain.kernels.lora_linear import Linear
from effitrain.kernels.lora_qkv import lora_qkv, reference

WIDTHS = (48, 16, 16)


def _linears(lora, adapted, quantised=True, bias=False):
    return [
        Linear(lora.frozen(n, 64, quantised, bias), lora.update(n, 64, 4) if name in adapted else None)
        for name, n in zip("qkv", WIDTHS, strict=True)
    ]


@pytest.mark.interpreter
@pytest.mark.parametrize("adapted", ["qkv", "qv", ""])
@pytest.mark.parametrize(("quantised", "bias"), [(True, False), (False, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernel(lora, adapted, quantised, bias, dtype):
    x = torch.randn(1, 13, 64).to(dtype).requires_grad_()
    linears = _linears(lora, adapted, quantised, bias)
    for linear in linears:
        linear.base.bias = None if linear.base.bias is None else linear.base.bias.to(dtype)
    lora.check(x, linears, lambda x, parts: lora_qkv(x, *parts), lambda x, parts: reference(x, *parts))


@pytest.mark.interpreter
def test_keeps_its_input_once(lora):
    x, kept = torch.randn(13, 64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        lora_qkv(x, *_linears(lora, "qkv"))
    assert sorted(kept) == sorted([x.nbytes] + 3 * [13 * 4 * 4])


def test_without_kernels(plain, lora):
    x = torch.randn(13, 64)
    linears = _linears(lora, "qk")
    assert all(torch.equal(a, b) for a, b in zip(lora_qkv(x, *linears), reference(x, *linears), strict=True))
