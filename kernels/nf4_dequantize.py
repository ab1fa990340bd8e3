"""NF4 with double quantisation back to floats in one pass over the bytes, bit for bit as bitsandbytes does it.

Formula, for element e of the flattened weight, in block b = e // 64 (Dettmers et al. 2023, QLoRA, section 3):
    scale_b = dynamic[absmax_b] nested[b // 256] + offset;   w_e = nf4[code_e] scale_b,  code_e the high half of byte
    e // 2 for even e, else the low half.

Shapes: packed uint8 [ceil(n / 2), 1], absmax uint8 [b], nested_absmax float32 [ceil(b / 256)], offset float32 []; out
[rows, columns], any shape with n elements. The four may be views anywhere in a larger blob, such as a streaming slot.
Products are rounded before they are added or cast (no fused multiply-add), as bitsandbytes' two kernels do.
"""

from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from effitrain.kernels.backend import tl, triton, usable
from effitrain.kernels.tiles import tiles_for

BLOCK, NESTED_BLOCK = 64, 256


class NF4Weight(Protocol):
    """What the kernels read of a quantised weight."""

    @property
    def packed(self) -> Tensor:
        """Two codes to a byte."""

    @property
    def absmax(self) -> Tensor:
        """Codes of the scales."""

    @property
    def nested_absmax(self) -> Tensor:
        """Scales of the scales."""

    @property
    def offset(self) -> Tensor:
        """Mean of the scales."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""


def reference(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    """The formula, one level after the other."""
    packed, blocks = weight.packed.flatten(), torch.arange(len(weight.absmax), device=weight.absmax.device)
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()
    nested = weight.nested_absmax[blocks // NESTED_BLOCK]
    scales = dynamic_code().to(packed.device)[weight.absmax.int()] * nested + weight.offset
    count = torch.Size(weight.shape).numel()
    values = nf4_code().to(packed.device)[codes[:count].int()] * scales.repeat_interleave(BLOCK)[:count]
    return values.to(dtype).view(weight.shape)


@triton.jit
def nf4_value(code):
    """The value of NF4 codes 0 to 15: four tests and fifteen selections, no table in memory."""
    b0, b1, b2, b3 = (code & 1) != 0, (code & 2) != 0, (code & 4) != 0, (code & 8) != 0
    v0 = tl.where(b1, tl.where(b0, -0.39491748809814453, -0.5250730514526367), tl.where(b0, -0.6961928009986877, -1.0))
    v1 = tl.where(b1, tl.where(b0, 0.0, -0.09105003625154495), tl.where(b0, -0.18477343022823334, -0.28444138169288635))
    v2 = tl.where(b1, tl.where(b0, 0.33791524171829224, 0.24611230194568634), tl.where(b0, 0.16093020141124725, 0.07958029955625534))  # fmt: skip  # noqa: E501
    v3 = tl.where(b1, tl.where(b0, 1.0, 0.7229568362236023), tl.where(b0, 0.5626170039176941, 0.44070982933044434))
    return tl.where(b3, tl.where(b2, v3, v2), tl.where(b2, v1, v0))


@triton.jit
def nf4_scale(block, absmax_ptr, nested_ptr, dynamic_ptr, offset_ptr, inside):
    """The float32 scales of ``block``s of 64 weights."""
    code = tl.load(absmax_ptr + block, mask=inside, other=0).to(tl.int32)
    nested = tl.load(nested_ptr + block // 256, mask=inside, other=0.0)
    return tl.load(dynamic_ptr + code) * nested + tl.load(offset_ptr)


@triton.jit
def nf4_blocks(block, size, packed_ptr, absmax_ptr, nested_ptr, dynamic_ptr, offset_ptr):
    """The weights of ``block``s [B], float32 [B, 64], of a weight of ``size`` bytes; finite numbers beyond its end.

    ``size`` is an argument and not made of the count of weights, so that the compiler knows its divisors: then a thread
    reads its bytes at once, eight or sixteen of them, and not one by one.
    """
    scale = nf4_scale(block, absmax_ptr, nested_ptr, dynamic_ptr, offset_ptr, block * 32 < size)[:, None]
    at = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    byte = tl.load(packed_ptr + at, mask=at < size, other=0).to(tl.int32)
    return tl.interleave(nf4_value(byte >> 4) * scale, nf4_value(byte & 15) * scale)


@triton.jit
def _nf4_dequantize(
    packed_ptr, absmax_ptr, nested_ptr, dynamic_ptr, offset_ptr, out_ptr, size, count, BLOCKS: tl.constexpr
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    values = nf4_blocks(block, size, packed_ptr, absmax_ptr, nested_ptr, dynamic_ptr, offset_ptr)
    out = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(out_ptr + out, values.to(out_ptr.dtype.element_ty), mask=out < count)


def nf4_dequantize(weight: NF4Weight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The values [rows, columns] that ``weight`` stands for, in ``dtype``.

    Args:
        weight: quantised, on the device where the values are wanted.
        dtype: float32, float16 or bfloat16.
        out: contiguous buffer of the weight's shape and ``dtype`` to write to; a new one by default.
    """
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype, device=weight.packed.device)
    if not usable("nf4_dequantize", out):
        return out.copy_(reference(weight, dtype))
    blocks = tiles_for(out.device).dequantize_blocks
    _nf4_dequantize[(triton.cdiv(out.numel(), 64 * blocks),)](
        *parts(weight), out, weight.packed.numel(), out.numel(), BLOCKS=blocks, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def parts(weight: NF4Weight) -> tuple[Tensor, ...]:
    """What the kernels read of ``weight``, in the order of their arguments."""
    return weight.packed, weight.absmax, weight.nested_absmax, dynamic_code_on(weight.packed.device), weight.offset


@cache
def nf4_code() -> Tensor:
    """The 16 values of NF4, float32 [16], ascending (QLoRA, appendix E)."""
    return torch.tensor(
        [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
         -0.18477343022833334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
         0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
    )  # fmt: skip


@cache
def dynamic_code() -> Tensor:
    """The 256 values of the signed 8-bit dynamic type, float32 [256], ascending (Dettmers 2015, arXiv:1511.04561)."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        means = 10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2.0)
        values += means.tolist() + (-means).tolist()
    return torch.tensor(sorted(values))


@cache
def dynamic_code_on(device: torch.device) -> Tensor:
    """``dynamic_code`` on ``device``."""
    return dynamic_code().to(device)
