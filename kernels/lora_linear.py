"""A frozen linear with a low-rank update, for the whole family of adapters that act on the r values in between.

Formula, for rows x:  low = drop(x) A^T;  z = mid(low);  y = x W^T + b + s z B^T.
    dz = s g B;  dlow = mid'(dz);  dx = g W + drop(dlow A);  dA = dlow^T drop(x);  dB = s g^T z.
``mid`` is nothing, a vector or mask d (z = d low, dd = sum dz low), a matrix C (z = low C^T, dlow = dz C, dC = dz^T
low) or a gate for each token (as d). See Hu et al. 2021; variants that need a mid are KaSA, SoRA, LoRA-XS, LoRAMoE, ...

Shapes: x [..., in], y [..., out], A [r, in], B [out, r], W [out, in] plain or NF4. Saved for backward: low [tokens, r],
and x only where A is trained. W is asked for again, wherever it then lives. All products are deterministic.

The update is added while y is written (``_lora_linear``, our own product) where the card's table says that this is
faster; else cuBLAS multiplies, and adds the update to its result in a second pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from effitrain.kernels.backend import rows_of, shaped, tl, triton, usable
from effitrain.kernels.dropout import dropout
from effitrain.kernels.nf4_linear import GROUP, WIDTHS, multiplies, multiply, tile_of
from effitrain.kernels.tiles import tiles_for

MAX_RANK = 128  # of an update that our own product adds: its tiles hold all of z and B at once


class Frozen(Protocol):
    """A frozen linear as the kernels see it."""

    bias: Tensor | None
    value_needed: bool

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in]."""

    def product(self, x: Tensor) -> Tensor:
        """``x W^T + b`` without a record for backward; zeros while the value is not needed."""

    def transposed_product(self, grad: Tensor, into: Tensor | None = None) -> Tensor:
        """``g W``, added to ``into`` if given."""


@dataclass(frozen=True)
class LowRank:
    """An update of one linear.

    Attributes:
        A: [r, in], float32 or the dtype of x.
        B: [out, r].
        scale: factor s.
        mid: None, a vector or mask [r], a gate [tokens, r], or with ``square`` a matrix [r, r].
        square: ``mid`` is a matrix.
        dropout: share of x that the update does not see.
        seed: of the dropped elements; recomputation with the same seed drops the same.
    """

    A: Tensor
    B: Tensor
    scale: float
    mid: Tensor | None = None
    square: bool = False
    dropout: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Linear:
    """A frozen linear and its update, if it has one."""

    base: Frozen
    low_rank: LowRank | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """What may be trained: A, B and mid."""
        update = self.low_rank
        return (None, None, None) if update is None else (update.A, update.B, update.mid)


def reference(x: Tensor, linear: Linear) -> Tensor:
    """The formula, left to autograd."""
    y = F.linear(x, linear.base.dense(x.dtype), linear.base.bias)
    update = linear.low_rank
    if update is None:
        return y
    low = F.linear(dropout(x, update.dropout, update.seed), update.A.to(x.dtype))
    return y + update.scale * F.linear(_mixed(low.flatten(0, -2), update).view(low.shape), update.B.to(x.dtype))


@triton.jit
def _lora_linear(
    x_ptr, w_ptr, z_ptr, b_ptr, bias_ptr, y_ptr, M, N, K, R, w_n, w_k, b_n, b_r, scale,
    ADD: tl.constexpr, BIAS: tl.constexpr, WIDE: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x [M, K] W + scale z [M, R] B (+ bias, + y itself); W and B are read by strides, either way round."""
    row, column = tile_of(M, N, GROUP, BM, BN)
    m, n, k = row + tl.arange(0, BM), column + tl.arange(0, BN), tl.arange(0, BK)
    m_in, n_in = (m % M).to(tl.int64), (n % N).to(tl.int64)  # beyond the end: any row that is there
    x_at = x_ptr + m_in[:, None] * K + k[None, :]
    w_at = w_ptr + k.to(tl.int64)[:, None] * w_k + n_in[None, :] * w_n
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, K, BK):
        x = tl.load(x_at, mask=k[None, :] < K - start, other=0.0)
        w = tl.load(w_at, mask=k[:, None] < K - start, other=0.0)
        total = multiply(x, w, total, WIDE)
        x_at += BK
        w_at += BK * w_k
    r = tl.arange(0, BR)
    z = tl.load(z_ptr + m_in[:, None] * R + r[None, :], mask=r[None, :] < R, other=0.0)
    b = tl.load(b_ptr + r[:, None] * b_r + n_in[None, :] * b_n, mask=r[:, None] < R, other=0.0)
    total += scale * multiply(z, b, tl.zeros((BM, BN), dtype=tl.float32), WIDE)
    if BIAS:
        total += tl.load(bias_ptr + n_in).to(tl.float32)[None, :]
    y_at = y_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    inside = (m[:, None] < M) & (n[None, :] < N)
    if ADD:
        total += tl.load(y_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_at, total.to(y_ptr.dtype.element_ty), mask=inside)


def fused_product(
    x: Tensor, weight: Tensor, z: Tensor, up: Tensor, scale: float, bias: Tensor | None = None,
    into: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``x weight + scale z up (+ bias)`` [M, N] in one pass over the output, added to ``into`` if given.

    ``weight`` [K, N] and ``up`` [R, N] may be transposed views; ``x`` [M, K] and ``z`` [M, R] are contiguous.
    """
    count, columns = len(x), weight.shape[1]
    tile = tiles_for(x.device).lora
    y = torch.empty(count, columns, dtype=x.dtype, device=x.device) if into is None else into
    _lora_linear[(triton.cdiv(count, tile.m) * triton.cdiv(columns, tile.n),)](
        x, weight, z, up, y if bias is None else bias, y, count, columns, x.shape[1], z.shape[1],
        weight.stride(1), weight.stride(0), up.stride(1), up.stride(0), scale,
        ADD=into is not None, BIAS=bias is not None, WIDE=not x.is_cuda, GROUP=GROUP,
        BM=tile.m, BN=tile.n, BK=tile.k, BR=max(16, triton.next_power_of_2(z.shape[1])),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y


def project(x: Tensor, linear: Linear) -> tuple[Tensor, Tensor | None]:
    """``y`` [M, out] and ``low`` [M, r] of rows ``x`` [M, in], without a record for backward."""
    base, update = linear.base, linear.low_rank
    if update is None:
        return base.product(x), None
    low = F.linear(dropout(x, update.dropout, update.seed), update.A.to(x.dtype))
    if not base.value_needed:
        return base.product(x), low
    z, up = _mixed(low, update), update.B.to(x.dtype).t()
    if _fuses(x, update):
        return fused_product(x, base.dense(x.dtype).t(), z, up, update.scale, base.bias), low
    return base.product(x).addmm_(z, up, alpha=update.scale), low


def low_gradients(
    grad: Tensor, low: Tensor | None, linear: Linear, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``low`` [M, r], B and mid; ``wanted`` says of A, B and mid which are trained."""
    update = linear.low_rank
    if update is None or low is None:
        return None, None, None
    dz = (grad @ update.B.to(grad.dtype)).mul_(update.scale)
    dB = (grad.t() @ _mixed(low, update)).mul_(update.scale).to(update.B.dtype) if wanted[1] else None
    mid = update.mid
    if mid is None:
        return dz, dB, None
    if update.square:
        return dz @ mid.to(dz.dtype), dB, (dz.t() @ low).to(mid.dtype) if wanted[2] else None
    dmid = (dz * low).to(mid.dtype) if wanted[2] else None
    return dz * mid.to(dz.dtype), dB, dmid.sum(0) if dmid is not None and mid.dim() == 1 else dmid


def input_gradient(grad: Tensor, dlow: Tensor | None, linear: Linear, into: Tensor | None = None) -> Tensor:
    """Gradient of the rows x [M, in], added to ``into`` if given."""
    base, update = linear.base, linear.low_rank
    if update is None or dlow is None:
        return base.transposed_product(grad, into)
    down = update.A.to(grad.dtype)
    if update.dropout:
        total = base.transposed_product(grad, into)
        return dropout(dlow @ down, update.dropout, update.seed, into=total)
    if _fuses(grad, update):
        return fused_product(grad, base.dense(grad.dtype), dlow, down, 1.0, into=into)
    return base.transposed_product(grad, into).addmm_(dlow, down)


def down_gradient(x: Tensor, dlow: Tensor | None, linear: Linear) -> Tensor | None:
    """Gradient of A, from the rows x that it saw."""
    update = linear.low_rank
    if update is None or dlow is None:
        return None
    return (dlow.t() @ dropout(x, update.dropout, update.seed)).to(update.A.dtype)


class _LoraLinears(torch.autograd.Function):
    """Several linears on one input, which is kept once and whose gradient is summed in one buffer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linears: tuple[Linear, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        flat = rows_of(x)
        outputs, lows = zip(*(project(flat, linear) for linear in linears), strict=True)
        ctx.linears, ctx.shape = linears, x.shape
        ctx.save_for_backward(flat if any(ctx.needs_input_grad[2::3]) else None, *lows)
        return tuple(shaped(y, *x.shape[:-1], y.shape[-1]) for y in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, *lows = ctx.saved_tensors
        dx, found = None, []
        for i, (linear, low, grad) in enumerate(zip(ctx.linears, lows, map(rows_of, grads), strict=True)):
            wanted = ctx.needs_input_grad[2 + 3 * i : 5 + 3 * i]
            dlow, dB, dmid = low_gradients(grad, low, linear, wanted)
            found += [down_gradient(x, dlow, linear) if wanted[0] else None, dB, dmid]
            if ctx.needs_input_grad[0]:
                dx = input_gradient(grad, dlow, linear, dx)
        return None if dx is None else dx.view(ctx.shape), None, *found


def lora_linears(x: Tensor, linears: Sequence[Linear]) -> tuple[Tensor, ...]:
    """The outputs [..., out] of several linears on ``x`` [..., in], by one function."""
    return _LoraLinears.apply(x, tuple(linears), *(tensor for linear in linears for tensor in linear.tensors))


def lora_linear(x: Tensor, linear: Linear) -> Tensor:
    """``x`` [..., in] through a frozen linear with its update: [..., out]; differentiable in x, A, B and mid.

    Off Triton's devices it is ``reference``.
    """
    if x.numel() and usable("lora_linear", x):
        return lora_linears(x, [linear])[0]
    return reference(x, linear)


def _fuses(x: Tensor, update: LowRank) -> bool:
    """Whether our own product makes y and adds the update: many rows, on cards where it is faster."""
    tiles = tiles_for(x.device)
    rank, width = update.A.shape
    fits = rank <= MAX_RANK and width % WIDTHS == update.B.shape[0] % WIDTHS == 0 and multiplies(x)
    return tiles.lora_fused and fits and tiles.nf4_tile(len(x)) is None and usable("lora_linear", x)


def _mixed(low: Tensor, update: LowRank) -> Tensor:
    if update.mid is None:
        return low
    mid = update.mid.to(low.dtype)
    return low @ mid.t() if update.square else low * mid
