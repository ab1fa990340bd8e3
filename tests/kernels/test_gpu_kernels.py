"""Every kernel on a card: against its reference at ragged shapes, NF4 bit for bit, and twice the same bits."""

from dataclasses import replace

import pytest
import torch

from effitrain.evals.kernels import CHECKS, TOLERANCES, Maker, error_of
from effitrain.kernels import lora_linear as room
from effitrain.kernels import nf4_linear
from effitrain.kernels.backend import capability
from effitrain.kernels.nf4_dequantize import nf4_dequantize, reference
from effitrain.kernels.tiles import Tile, tiles_for
from effitrain.quant.nf4 import quantize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
]
CUDA = torch.device("cuda")
HALVES = (torch.float16, torch.bfloat16)  # what our own products take on a card


@pytest.fixture(autouse=True)
def _modern():
    if capability(CUDA) < (8, 0):
        pytest.skip("the kernels need Ampere or later")


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("kernel", CHECKS)
def test_agrees_with_the_reference(kernel, dtype):
    assert error_of(kernel, CUDA, dtype) <= TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", CHECKS)
def test_gives_the_same_bits_twice(kernel, dtype):
    first, second = (
        CHECKS[kernel](Maker(CUDA, dtype, torch.Generator().manual_seed(0)))[0] for _ in range(2)
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (100, 96), (33, 129), (4096, 4096), (1000, 14336)])
def test_nf4_is_bitsandbytes_bit_for_bit(shape, dtype):
    import bitsandbytes.functional as bnb

    weight = quantize(torch.randn(shape, device=CUDA))
    absmax = bnb.dequantize_blockwise(
        weight.absmax, absmax=weight.nested_absmax, code=bnb.create_dynamic_map().to(CUDA), blocksize=256
    )
    stock = torch.ops.bitsandbytes.dequantize_4bit(weight.packed, absmax + weight.offset, 64, "nf4", list(shape), dtype)
    assert torch.equal(nf4_dequantize(weight, dtype), stock)
    assert torch.equal(reference(weight, dtype), stock)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("rows", "out", "inp", "rank"), [(17, 100, 72, 5), (300, 512, 1024, 16), (1000, 640, 256, 128)]
)
@pytest.mark.parametrize("transposed", [False, True])
def test_our_own_product(dtype, rows, out, inp, rank, transposed):
    x, z = (torch.randn(rows, n, device=CUDA).to(dtype) for n in (inp, rank))
    weight = torch.randn(*((inp, out) if transposed else (out, inp)), device=CUDA).to(dtype)
    up = torch.randn(*((rank, out) if transposed else (out, rank)), device=CUDA).to(dtype)
    weight, up = (weight, up) if transposed else (weight.t(), up.t())
    total = torch.randn(rows, out, device=CUDA).to(dtype)
    wanted = x.double() @ weight.double() + 0.5 * z.double() @ up.double() + total.double()
    found = room.fused_product(x, weight, z, up, 0.5, into=total)
    assert (found.double() - wanted).abs().max() <= TOLERANCES[dtype] * wanted.abs().max()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tile", [Tile(16, 32, 64, 4, 3), Tile(64, 64, 64, 4, 3), Tile(128, 128, 64, 8, 3)])
@pytest.mark.parametrize(("rows", "out", "inp"), [(1, 48, 64), (70, 304, 1024), (1000, 640, 192)])
def test_nf4_product_at_every_tile(monkeypatch, dtype, tile, rows, out, inp):
    monkeypatch.setattr(nf4_linear, "tiles_for", lambda device: replace(tiles_for(device), nf4=((4096, tile),)))
    weight = quantize(torch.randn(out, inp, device=CUDA))
    x, grad, total = (torch.randn(rows, n, device=CUDA).to(dtype) for n in (inp, out, inp))
    dense, wanted = reference(weight, dtype).double(), total.double()
    found = nf4_linear.product(x, weight), nf4_linear.transposed_product(grad, weight, total)
    for value, want in zip(found, (x.double() @ dense.T, wanted + grad.double() @ dense), strict=True):
        assert (value.double() - want).abs().max() <= TOLERANCES[dtype] * want.abs().max()
