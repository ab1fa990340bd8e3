"""Root-mean-square norm (Zhang and Sennrich 2019), of hidden states or of the heads of queries and keys.

Formula, for a row x [H]:  r = 1 / sqrt(mean(x^2) + eps);  y = w x r.
    dx = r (w g) - x r^3 mean(w g x);  dw = sum over rows of g x r.

Shapes: x and y [..., H], w [H], one dtype; arithmetic in float32. Saved for backward: x, which the residual stream
keeps anyway, and r [rows] in float32. Deterministic: dw is summed over fixed shares of the rows, without atomics.
"""

from typing import Any

import torch
from torch import Tensor

from effitrain.kernels.backend import rows_of, shaped, tl, triton, usable

SHARES = 256  # programs of the backward pass, and parts that dw is summed from: two for each of a large card's units
TILE = 2048  # elements of several short rows that a program takes at once


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The formula as transformers computes it: normed in float32, rounded, then scaled."""
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


@triton.jit
def _forward(x_ptr, w_ptr, y_ptr, r_ptr, rows, H, eps, ROWS: tl.constexpr, COLS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    inside = (row[:, None] < rows) & (col[None, :] < H)
    x = tl.load(x_ptr + row[:, None] * H + col[None, :], mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + col, mask=col < H, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(x * x, 1) / H + eps)
    y = x * r[:, None] * w[None, :]
    tl.store(y_ptr + row[:, None] * H + col[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(r_ptr + row, r, mask=row < rows)


@triton.jit
def _backward(
    g_ptr, x_ptr, w_ptr, r_ptr, dx_ptr, dw_ptr, rows, H, share,
    WEIGHT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, COLS)
    w = tl.load(w_ptr + col, mask=col < H, other=0.0).to(tl.float32)
    dw = tl.zeros((COLS,), dtype=tl.float32)
    for start in range(0, share, ROWS):
        row = part * share + start + tl.arange(0, ROWS)
        inside = (row[:, None] < rows) & (col[None, :] < H)
        at = row[:, None] * H + col[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(r_ptr + row, mask=row < rows, other=0.0)[:, None]
        normed, wg = x * r, g * w[None, :]
        dx = r * (wg - normed * (tl.sum(wg * normed, 1) / H)[:, None])
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if WEIGHT:
            dw += tl.sum(g * normed, 0)
    if WEIGHT:
        tl.store(dw_ptr + part * H + col, dw, mask=col < H)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        flat = rows_of(x)
        y, r = torch.empty_like(flat), torch.empty(len(flat), dtype=torch.float32, device=x.device)
        rows, cols, warps = _tile(flat)
        _forward[(triton.cdiv(len(flat), rows),)](
            flat, weight, y, r, len(flat), flat.shape[1], eps, ROWS=rows, COLS=cols, num_warps=warps
        )
        ctx.save_for_backward(x, weight, r)
        return shaped(y, *x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, r = ctx.saved_tensors
        flat, trained = rows_of(x), ctx.needs_input_grad[1]
        count, hidden = flat.shape
        rows, cols, warps = _tile(flat)
        share = triton.cdiv(triton.cdiv(count, SHARES), rows) * rows
        shares = triton.cdiv(count, share)
        dx = torch.empty_like(flat)
        dw = torch.empty(shares if trained else 0, hidden, dtype=torch.float32, device=x.device)
        _backward[(shares,)](
            rows_of(grad), flat, weight, r, dx, dw, count, hidden, share,
            WEIGHT=trained, ROWS=rows, COLS=cols, num_warps=warps,
        )  # fmt: skip
        return dx.view(x.shape), dw.sum(0).to(weight.dtype) if trained else None, None


class _Frozen(torch.autograd.Function):
    """``reference`` in float32 under a weight that is not trained, with the formula's gradient: half of autograd's time
    on a CPU, and nothing more is kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, r)
        return (x * r).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, weight, r = ctx.saved_tensors
        dx = grad * weight
        share = (dx * x).mean(-1, keepdim=True).mul_(r.pow(3))
        return dx.mul_(r).addcmul_(x, share, value=-1), None, None


def _tile(flat: Tensor) -> tuple[int, int, int]:
    """Rows and columns that a program holds, and its warps: a row of 8,192 is 32 values a thread."""
    cols = triton.next_power_of_2(flat.shape[1])
    rows = max(1, TILE // cols)
    return rows, cols, min(max(rows * cols // 1024, 4), 16)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x`` [..., H] over the root mean square of its rows, times ``weight`` [H].

    On the CPU its value is that of ``reference`` bit for bit, and float32 copies of ``x`` are kept for backward.
    """
    if x.numel() and x.dtype == weight.dtype:
        if usable("rms_norm", x, weight):
            return _RMSNorm.apply(x, weight, eps)
        if x.dtype == torch.float32 and not weight.requires_grad:
            return _Frozen.apply(x, weight, eps)
    return reference(x, weight, eps)
