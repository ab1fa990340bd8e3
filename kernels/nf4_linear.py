"""Product with an NF4 weight without ever writing the weight out, or by way of its floats, as the card's table says.

Formula, with W [out, in] dequantised as in ``nf4_dequantize`` and rounded to the dtype of x:
    forward y = x W^T + b;  backward to x only, dx = g W: the same bytes read the other way, no transposed copy.

Shapes: x [..., in], y [..., out]. Nothing is saved for backward: the weight is asked for again, wherever it then lives.
The fused product turns a piece of W into floats in registers, just before it is multiplied. It reads 0.5 bytes a weight
where floats cost 4.5 (0.5 read, 2 written, 2 read), but makes the floats again for every tile of rows: good for few
tokens, and up to how many is in ``tiles``, with a tile for each range. It needs in to be a multiple of 64, so that a
row is whole blocks, and out one of 16.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from effitrain.kernels import nf4_dequantize as nf4
from effitrain.kernels.backend import rows_of, shaped, tl, triton, usable
from effitrain.kernels.nf4_dequantize import BLOCK, NF4Weight, nf4_blocks, nf4_dequantize, parts
from effitrain.kernels.tiles import tiles_for

WIDTHS = 16  # of which both widths of a product must be multiples: loads of other widths are slow, and spill
GROUP = 8  # rows of tiles that share their columns of the weight in the card's cache


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
def tile_of(M, N, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """First row and column of the tile of an output [M, N] that this program makes."""
    columns = tl.cdiv(N, BN)
    group = tl.program_id(0) // (GROUP * columns)
    rows = min(tl.cdiv(M, BM) - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * columns)
    return (group * GROUP + within % rows) * BM, within // rows * BN


@triton.jit
def _piece(
    row, column, width, size, packed_ptr, absmax_ptr, nested_ptr, dynamic_ptr, offset_ptr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """W[row : row + ROWS, column : column + COLUMNS], of rows of ``width``; finite numbers beyond their ends."""
    rows = (row + tl.arange(0, ROWS)).to(tl.int64)
    block = rows[:, None] * (width // 64) + column // 64 + tl.arange(0, COLUMNS // 64)[None, :]
    block = tl.reshape(block, (ROWS * (COLUMNS // 64),))
    values = nf4_blocks(block, size, packed_ptr, absmax_ptr, nested_ptr, dynamic_ptr, offset_ptr)
    return tl.reshape(values, (ROWS, COLUMNS))


@triton.jit
def _nf4_linear(
    x_ptr, packed_ptr, absmax_ptr, nested_ptr, dynamic_ptr, offset_ptr, bias_ptr, y_ptr, size, M, N, K,
    TRANSPOSED: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, WIDE: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x [M, K] W^T (+ bias, + y itself), W [N, K]; TRANSPOSED: x W, W [K, N]."""
    row, column = tile_of(M, N, GROUP, BM, BN)
    m, n, k = row + tl.arange(0, BM), column + tl.arange(0, BN), tl.arange(0, BK)
    x_at = x_ptr + (m % M).to(tl.int64)[:, None] * K + k[None, :]  # beyond the end: any row that is there
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, K, BK):
        x = tl.load(x_at, mask=k[None, :] < K - start, other=0.0)
        if TRANSPOSED:
            w = _piece(
                start, column, N, size, packed_ptr, absmax_ptr, nested_ptr, dynamic_ptr, offset_ptr, BK, BN
            ).to(x.dtype)  # fmt: skip
        else:
            w = _piece(
                column, start, K, size, packed_ptr, absmax_ptr, nested_ptr, dynamic_ptr, offset_ptr, BN, BK
            ).to(x.dtype).trans()  # fmt: skip
        total = multiply(x, w, total, WIDE)
        x_at += BK
    if BIAS:
        total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    y_at = y_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    inside = (m[:, None] < M) & (n[None, :] < N)
    if ADD:
        total += tl.load(y_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_at, total.to(y_ptr.dtype.element_ty), mask=inside)


def multiplies(x: Tensor) -> bool:
    """Whether our own products may take ``x``: on a card halves alone, as float32 has no tensor cores and spills."""
    return x.dtype != torch.float32 or not x.is_cuda


def fused(x: Tensor, weight: NF4Weight) -> bool:
    """Whether a product of ``x`` with ``weight``, either way, is best made without the weight's floats."""
    tile = tiles_for(x.device).nf4_tile(_tokens(x))
    fits = weight.shape[0] % WIDTHS == weight.shape[1] % BLOCK == 0
    return tile is not None and fits and multiplies(x) and usable("nf4_linear", x, weight.nested_absmax)


def product(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` without a record for backward, [..., out]."""
    if not fused(x, weight):
        return F.linear(x, nf4_dequantize(weight, x.dtype), bias)
    y = torch.empty(_tokens(x), weight.shape[0], dtype=x.dtype, device=x.device)
    return _multiply(rows_of(x), weight, y, bias=bias).view(*x.shape[:-1], -1)


def transposed_product(grad: Tensor, weight: NF4Weight, into: Tensor | None = None) -> Tensor:
    """``g W`` [..., in], added to ``into`` [M, in] if given."""
    if not fused(grad, weight):
        dense = nf4_dequantize(weight, grad.dtype)
        return grad @ dense if into is None else into.addmm_(grad, dense)
    add = into is not None
    y = torch.empty(_tokens(grad), weight.shape[1], dtype=grad.dtype, device=grad.device) if into is None else into
    return _multiply(rows_of(grad), weight, y, transposed=True, add=add).view(*grad.shape[:-1], -1)


def _multiply(
    x: Tensor, weight: NF4Weight, y: Tensor, bias: Tensor | None = None, transposed: bool = False, add: bool = False
) -> Tensor:
    """The fused product of rows ``x`` [M, K] into ``y`` [M, N]."""
    (count, depth), columns = x.shape, y.shape[1]
    tile = tiles_for(x.device).nf4_tile(count)
    assert tile is not None
    wide = max(tile.n, BLOCK) if transposed else tile.n  # blocks lie along the output's columns
    _nf4_linear[(triton.cdiv(count, tile.m) * triton.cdiv(columns, wide),)](
        x, *parts(weight), y if bias is None else bias, y, weight.packed.numel(), count, columns, depth,
        TRANSPOSED=transposed, BIAS=bias is not None, ADD=add, WIDE=not x.is_cuda, GROUP=GROUP,
        BM=tile.m, BN=wide, BK=tile.k, num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
    )  # fmt: skip
    return y


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


def _tokens(x: Tensor) -> int:
    return x.shape[:-1].numel()
