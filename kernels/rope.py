"""Rotary position embedding (Su et al. 2021) of queries or keys.

Formula, for the pair (a, b) number i of a head, at a position with cos_i and sin_i:
    a' = a cos_i - b sin_i;  b' = b cos_i + a sin_i.  The gradient is the same with -sin.
Pairs are (i, i + D/2), as transformers stores weights, or (2i, 2i + 1), as GPT-J and the original Llama do.

Shapes: x [B, T, heads, D], cos and sin [B or 1, T, D], of which the first D/2 columns count: one angle a pair. Scaling
for longer context, be it Llama 3's, linear or YaRN, is in the tables. Saved for backward: the tables alone.
"""

from typing import Any

import torch
from torch import Tensor

from effitrain.kernels.backend import tl, triton, usable

HEADS = 16  # of one token that a program turns


def reference(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """The formula, as transformers computes it where pairs are halves."""
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    if interleaved:
        half = x.shape[-1] // 2
        cos, sin = (t[..., :half].repeat_interleave(2, -1) for t in (cos, sin))
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    else:
        a, b = x.chunk(2, -1)
        turned = torch.cat((-b, a), -1)
    return x * cos + turned * sin


@triton.jit
def _rope(
    x_ptr, cos_ptr, sin_ptr, y_ptr, heads, D, positions, SIGN: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, HALF)
    known = pair < D // 2
    table = token % positions * D + pair
    cos = tl.load(cos_ptr + table, mask=known, other=0.0).to(tl.float32)[None, :]
    sin = SIGN * tl.load(sin_ptr + table, mask=known, other=0.0).to(tl.float32)[None, :]
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    inside = (head[:, None] < heads) & known[None, :]
    first = (token * heads + head[:, None]) * D + (2 * pair if INTERLEAVED else pair)[None, :]
    second = first + (1 if INTERLEAVED else D // 2)
    a = tl.load(x_ptr + first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + second, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + first, (a * cos - b * sin).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(y_ptr + second, (b * cos + a * sin).to(y_ptr.dtype.element_ty), mask=inside)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.interleaved = interleaved
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, interleaved, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, ctx.interleaved, -1), None, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, sign: int) -> Tensor:
    x, y = x.contiguous(), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    batch, length, heads, dim = x.shape
    positions = length if len(cos) == 1 else batch * length
    _rope[(batch * length, triton.cdiv(heads, HEADS))](
        x, cos.contiguous(), sin.contiguous(), y, heads, dim, positions, SIGN=sign, INTERLEAVED=interleaved,
        HEADS=HEADS, HALF=triton.next_power_of_2(dim // 2), num_warps=4,
    )  # fmt: skip
    return y


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """``x`` [B, T, heads, D] turned by the angles of ``cos`` and ``sin`` [B or 1, T, D]; on the CPU ``reference``.

    Args:
        x: queries or keys.
        cos: table of the tokens' positions, as transformers' rotary embeddings give it.
        sin: the same.
        interleaved: pairs are neighbours, not halves.
    """
    if x.numel() and usable("rope", x, cos, sin):
        return _Rope.apply(x, cos, sin, interleaved)
    return reference(x, cos, sin, interleaved)
