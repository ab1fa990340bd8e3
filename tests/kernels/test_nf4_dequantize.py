"""NF4 to floats: bit for bit as bitsandbytes, at any shape, from views in a blob into a caller's buffer."""

from dataclasses import replace

import bitsandbytes.functional as bnb
import pytest
import torch

from effitrain.io.nf4 import NF4Tensor
from effitrain.kernels.nf4_dequantize import nf4_dequantize, reference
from effitrain.quant.nf4 import quantize

SHAPES = [(1, 1), (3, 5), (7, 64), (64, 64), (100, 96), (33, 129), (172, 256), (5, 13001)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
interpreter = pytest.mark.interpreter


def _stock(weight: NF4Tensor, dtype):
    absmax = bnb.dequantize_blockwise(
        weight.absmax, absmax=weight.nested_absmax, code=bnb.create_dynamic_map(), blocksize=256
    )
    absmax += weight.offset
    flat = [torch.Size(weight.shape).numel()]  # its CPU kernel is wrong for blocks that straddle rows
    return torch.ops.bitsandbytes.dequantize_4bit(weight.packed, absmax, 64, "nf4", flat, dtype).view(weight.shape)


def _chopped(values):
    """float32 to bfloat16 as Triton's interpreter stores it: the lower half is cut off, not rounded."""
    return (values.view(torch.int32) & -65536).view(torch.float32).bfloat16()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_is_bitsandbytes(plain, shape, dtype):
    weight = quantize(torch.randn(shape))
    assert torch.equal(nf4_dequantize(weight, dtype), _stock(weight, dtype))
    assert torch.equal(reference(weight, dtype), _stock(weight, dtype))


@interpreter
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_is_bitsandbytes(shape, dtype):
    weight = quantize(3 * torch.randn(shape))
    wanted = _chopped(_stock(weight, torch.float32)) if dtype == torch.bfloat16 else _stock(weight, dtype)
    assert torch.equal(nf4_dequantize(weight, dtype), wanted)


@interpreter
def test_every_code_and_scale():
    blocks = 512
    weight = NF4Tensor(
        packed=torch.arange(256, dtype=torch.uint8).repeat(blocks * 32 // 256).view(-1, 1),
        absmax=torch.arange(blocks).to(torch.uint8),
        nested_absmax=torch.tensor([0.7, 0.3]),
        offset=torch.tensor(0.123),
        shape=(blocks, 64),
    )
    assert torch.equal(nf4_dequantize(weight, torch.float32), _stock(weight, torch.float32))


@interpreter
@pytest.mark.parametrize("start", [0, 3, 16])
def test_straight_from_a_slot_blob(start):
    """The four parts lie in one blob of bytes, at any offset that their dtype allows."""
    weight = quantize(torch.randn(70, 96))
    parts = {name: getattr(weight, name) for name in ("nested_absmax", "offset", "packed", "absmax")}
    blob = torch.full((start + weight.nbytes + 64,), 255, dtype=torch.uint8)
    views, at = {}, start + -start % 4  # floats first, on a multiple of four
    for name, tensor in parts.items():
        views[name] = blob[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        views[name].copy_(tensor)
        at += tensor.nbytes
    out = torch.full((2 * 70 * 96,), float("nan"))
    buffer = out[:6720].view(70, 96)
    assert nf4_dequantize(replace(weight, **views), torch.float32, buffer) is buffer
    assert torch.equal(buffer, _stock(weight, torch.float32)) and out[6720:].isnan().all()
