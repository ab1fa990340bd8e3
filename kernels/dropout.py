"""Dropout that keeps no mask: what is dropped depends on a seed and the element's place, and is drawn again later.

Formula:  y_e = x_e / (1 - p) where u_e >= p, else 0;  u_e in [0, 1) from the first word of Philox 4x32-10 (Salmon et
al. 2011) with counter e and key ``seed``, as Triton's ``tl.rand`` draws it. The gradient is the same function of dy.

Shapes: x and y alike, fewer than 2^31 elements. Nothing is saved for backward.
"""

from typing import Any

import torch
from torch import Tensor

from effitrain.kernels.backend import tl, triton, usable

ELEMENTS = 1024  # of one program
LIMIT = 2**31  # elements, and seeds: counters and keys of 32 bits


def uniform(count: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """The numbers u, float32 [count]."""
    words = [torch.arange(count, device=device), *(torch.zeros(count, dtype=torch.int64, device=device),) * 3]
    keys, mask = [seed & 0xFFFFFFFF, seed >> 32], 0xFFFFFFFF
    for _ in range(10):
        a, b = 0xD2511F53 * words[0], 0xCD9E8D57 * words[2]  # 64 bits: wraps to a negative number, whose bits are right
        words = [(b >> 32 & mask) ^ words[1] ^ keys[0], b & mask, (a >> 32 & mask) ^ words[3] ^ keys[1], a & mask]
        keys = [keys[0] + 0x9E3779B9 & mask, keys[1] + 0xBB67AE85 & mask]
    signed = words[0].to(torch.int32)
    return torch.where(signed < 0, -signed - 1, signed) * 4.6566127342e-10


def reference(x: Tensor, p: float, seed: int) -> Tensor:
    """The formula."""
    kept = uniform(x.numel(), seed, x.device).view(x.shape) >= p
    return torch.where(kept, x.float() / (1 - p), 0).to(x.dtype) if x.dtype != torch.float64 else kept * x / (1 - p)


@triton.jit
def _dropout(x_ptr, y_ptr, count, p, seed, ADD: tl.constexpr, ELEMENTS: tl.constexpr):
    at = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    x = tl.load(x_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    y = tl.where(tl.rand(seed, at) >= p, x / (1.0 - p), 0.0)
    if ADD:
        y += tl.load(y_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=at < count)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: int) -> Tensor:
        ctx.p, ctx.seed = p, seed
        return _apply(x, p, seed, None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _apply(grad, ctx.p, ctx.seed, None), None, None


def dropout(x: Tensor, p: float, seed: int, into: Tensor | None = None) -> Tensor:
    """``x`` with a share ``p`` of its elements dropped; ``p`` 0 gives ``x`` itself.

    Args:
        x: any shape.
        p: share of the elements, at least 0 and below 1.
        seed: below 2^31.
        into: contiguous tensor to add the result to, without a record for backward.
    """
    if into is not None:
        return _apply(x, p, seed, into)
    return _Dropout.apply(x, p, seed) if p else x


def _apply(x: Tensor, p: float, seed: int, into: Tensor | None) -> Tensor:
    if x.numel() >= LIMIT or not usable("dropout", x):
        dropped = reference(x, p, seed)
        return dropped if into is None else into.add_(dropped)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if into is None else into
    _dropout[(triton.cdiv(x.numel(), ELEMENTS),)](
        x.contiguous(), y, x.numel(), p, seed, ADD=into is not None, ELEMENTS=ELEMENTS, num_warps=4
    )
    return y
