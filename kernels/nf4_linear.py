"""Product with an NF4 weight: for few tokens without ever writing the weight out, for many by way of its floats.

Formula, with W [out, in] dequantised as in ``nf4_dequantize`` and rounded to the dtype of x:
    forward y = x W^T + b;  backward to x only, dx = g W: the same bytes read the other way, no transposed copy.

Shapes: x [..., in], y [..., out]. Nothing is saved for backward: the weight is asked for again, wherever it then lives.
A byte holds two neighbouring inputs, so the fused product multiplies the even columns of x by the high halves and the
odd ones by the low halves, and the transposed one makes even and odd columns of dx. It needs in to be a multiple of 64,
so that a row of 64 inputs has one scale. Up to which number of tokens it is used is in ``tiles``.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from effitrain.kernels import nf4_dequantize as nf4
from effitrain.kernels.backend import rows_of, shaped, tl, triton, usable
from effitrain.kernels.nf4_dequantize import BLOCK, NF4Weight, dynamic_code_on, nf4_dequantize, nf4_scale, nf4_value
from effitrain.kernels.tiles import tiles_for


def reference(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """The formula."""
    return F.linear(x, nf4.reference(weight, x.dtype), bias)


@triton.jit
def multiply(a, b, total, WIDE: tl.constexpr):
    """``total + a b`` in float32; WIDE for Triton's interpreter, which multiplies bfloat16 wrongly."""
    if WIDE:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _nf4_linear(
    x_ptr, packed_ptr, absmax_ptr, nested_ptr, dynamic_ptr, offset_ptr, bias_ptr, y_ptr, M, N, K,
    BIAS: tl.constexpr, WIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x [M, K] W^T + bias, W [N, K]: 64 of K at a time."""
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    pair = tl.arange(0, 32)
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, K, 64):
        block = (n.to(tl.int64) * K + k) // 64
        scale = nf4_scale(block, absmax_ptr, nested_ptr, dynamic_ptr, offset_ptr, n < N)[None, :]
        byte = tl.load(packed_ptr + block[None, :] * 32 + pair[:, None], mask=n[None, :] < N, other=0).to(tl.int32)
        at = x_ptr + m[:, None].to(tl.int64) * K + k + 2 * pair[None, :]
        even = tl.load(at, mask=m[:, None] < M, other=0.0)
        odd = tl.load(at + 1, mask=m[:, None] < M, other=0.0)
        total = multiply(even, (nf4_value(byte >> 4) * scale).to(even.dtype), total, WIDE)
        total = multiply(odd, (nf4_value(byte & 15) * scale).to(odd.dtype), total, WIDE)
    if BIAS:
        total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    out = m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(y_ptr + out, total.to(y_ptr.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def _nf4_linear_transposed(
    g_ptr, packed_ptr, absmax_ptr, nested_ptr, dynamic_ptr, offset_ptr, y_ptr, M, N, K,
    WIDE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y [M, N] = g [M, K] W, W [K, N]: a program makes 64 columns, BK of K at a time."""
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    column = tl.program_id(0)
    pair = tl.arange(0, 32)
    even = tl.zeros((BM, 32), dtype=tl.float32)
    odd = tl.zeros((BM, 32), dtype=tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        block = k.to(tl.int64) * (N // 64) + column
        scale = nf4_scale(block, absmax_ptr, nested_ptr, dynamic_ptr, offset_ptr, k < K)[:, None]
        byte = tl.load(packed_ptr + block[:, None] * 32 + pair[None, :], mask=k[:, None] < K, other=0).to(tl.int32)
        inside = (m[:, None] < M) & (k[None, :] < K)
        g = tl.load(g_ptr + m[:, None].to(tl.int64) * K + k[None, :], mask=inside, other=0.0)
        even = multiply(g, (nf4_value(byte >> 4) * scale).to(g.dtype), even, WIDE)
        odd = multiply(g, (nf4_value(byte & 15) * scale).to(g.dtype), odd, WIDE)
    out = m[:, None].to(tl.int64) * N + column * 64 + tl.arange(0, 64)[None, :]
    tl.store(y_ptr + out, tl.interleave(even, odd).to(y_ptr.dtype.element_ty), mask=m[:, None] < M)


def fused(x: Tensor, weight: NF4Weight) -> bool:
    """Whether a product of ``x`` with ``weight``, either way, is best made without the weight's floats."""
    return (
        weight.shape[1] % BLOCK == 0
        and x.numel() <= tiles_for(x.device).nf4_fused_tokens * x.shape[-1]
        and usable("nf4_linear", x, weight.nested_absmax)
    )


def product(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` without a record for backward, [..., out]."""
    if not fused(x, weight):
        return F.linear(x, nf4_dequantize(weight, x.dtype), bias)
    flat, (out, inp) = rows_of(x), weight.shape
    tile, y = tiles_for(x.device).nf4, torch.empty(len(flat), out, dtype=x.dtype, device=x.device)
    _nf4_linear[(triton.cdiv(out, tile.n), triton.cdiv(len(flat), tile.m))](
        flat, *_parts(weight), y if bias is None else bias, y, len(flat), out, inp, BIAS=bias is not None,
        WIDE=not x.is_cuda, BM=tile.m, BN=tile.n, num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
    )  # fmt: skip
    return y.view(*x.shape[:-1], out)


def transposed_product(grad: Tensor, weight: NF4Weight) -> Tensor:
    """``g W`` [..., in]."""
    if not fused(grad, weight):
        return grad @ nf4_dequantize(weight, grad.dtype)
    flat, (out, inp) = rows_of(grad), weight.shape
    tile, y = tiles_for(grad.device).nf4, torch.empty(len(flat), inp, dtype=grad.dtype, device=grad.device)
    _nf4_linear_transposed[(inp // BLOCK, triton.cdiv(len(flat), tile.m))](
        flat, *_parts(weight), y, len(flat), inp, out, WIDE=not grad.is_cuda, BM=tile.m, BK=tile.n,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
    )  # fmt: skip
    return y.view(*grad.shape[:-1], inp)


class _NF4Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: NF4Weight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        y = product(x, weight, bias)
        return shaped(y, *y.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return transposed_product(grad, ctx.weight), None, None


def nf4_linear(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """``x`` [..., in] times a frozen NF4 weight [out, in], plus a frozen ``bias`` [out]: [..., out].

    Differentiable in ``x`` only. The caller keeps the weight's tensors as they are until the backward pass; one that
    moves them uses ``product`` and ``transposed_product`` in a function of its own.
    """
    return _NF4Linear.apply(x, weight, bias)


def _parts(weight: NF4Weight) -> tuple[Tensor, ...]:
    packed = weight.packed
    return packed, weight.absmax, weight.nested_absmax, dynamic_code_on(packed.device), weight.offset
