"""NF4 and the frozen linear on a card against the same on the CPU."""

import pytest
import torch

from effitrain.core.spec import Axis, LinearSpec
from effitrain.quant.linear import FrozenLinear
from effitrain.quant.nf4 import dequantize, quantize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("shape", [(64, 64), (172, 64), (100, 96), (7, 64), (512, 1024)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantising_gives_the_same_bits(shape, dtype):
    stored = quantize(torch.randn(shape))
    there = dequantize(stored.to("cuda"), dtype)
    assert there.is_cuda and torch.equal(there.cpu(), dequantize(stored, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantising_gives_the_same_codes(dtype):
    """A weight on the border of two codes, and scales whose mean is summed in another order, may fall either way."""
    weight = torch.randn(512, 1024).to(dtype)
    here, there = quantize(weight), quantize(weight.cuda())
    assert all(t.is_cuda for t in (there.packed, there.absmax, there.nested_absmax, there.offset))
    assert (there.packed.cpu() != here.packed).float().mean() < 1e-3
    assert (there.absmax.cpu() != here.absmax).float().mean() < 1e-2
    torch.testing.assert_close(there.nested_absmax.cpu(), here.nested_absmax, rtol=1e-4, atol=0)
    torch.testing.assert_close(there.offset.cpu(), here.offset, rtol=1e-5, atol=0)


def _pair(quantised, bias, dtype):
    """The same linear on the CPU and on the card."""
    here, there = (FrozenLinear(LinearSpec("p", Axis.FFN, Axis.MODEL, 96, 64, bias)) for _ in range(2))
    weight = torch.randn(96, 64).to(dtype)
    here.weight = quantize(weight) if quantised else weight
    there.weight = here.weight.to("cuda")
    if bias:
        here.bias = torch.randn(96).to(dtype)
        there.bias = here.bias.cuda()
    return here, there


# Sums of 64 or 96 products: another order moves them by 1e-6 in fp32; the halves round the sum to 11 and 8 bits.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lead", [(1,), (5,), (2, 3)])
def test_output_and_gradient_of_the_cpu(dtype, tolerance, quantised, bias, lead):
    here, there = _pair(quantised, bias, dtype)
    x, g = torch.randn(*lead, 64).to(dtype), torch.randn(*lead, 96).to(dtype)
    found = x.cuda().requires_grad_()
    y = there(found)
    (grad,) = torch.autograd.grad(y, found, g.cuda())
    dense = here.dense(dtype).double()
    wanted = x.double() @ dense.T + (here.bias.double() if bias else 0), g.double() @ dense
    assert y.dtype == grad.dtype == dtype
    for value, want in zip((y, grad), wanted, strict=True):
        assert (value.detach().cpu().double() - want).abs().max() < tolerance * want.abs().max()


def test_nothing_is_kept_for_backward():
    _, there = _pair(True, False, torch.float32)
    x = torch.randn(4096, 64, device="cuda", requires_grad=True)
    there(x)  # libraries make their workspaces
    before = torch.cuda.memory_allocated()
    y = there(x)
    assert torch.cuda.memory_allocated() - before == y.nbytes
