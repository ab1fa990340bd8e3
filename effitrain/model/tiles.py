"""What computes each token by itself, in tiles of tokens: what it needs for backward is made again, tile by tile.

At 32,768 tokens the widest tensors of a 70B layer are those of its MLP, then its norms' in float32; in tiles their
peak does not grow with the tokens. Shapes: x [..., H], H hidden size.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from effitrain.quant.linear import FrozenLinear


def in_tiles(
    block: Callable[[Tensor], Tensor],
    x: Tensor,
    parameters: Sequence[Tensor],
    tile: int,
    last: FrozenLinear | None = None,
) -> Tensor:
    """``block(x)`` from tiles of at most ``tile`` tokens, keeping only ``x`` for backward.

    Args:
        block: a deterministic function of each row of its input [n, H] by itself, and of ``parameters``, to [n, H].
        x: its input [..., H].
        parameters: the trainable tensors that ``block`` reads; they get gradients, summed in the order of the tiles.
        tile: in tokens; tiles are of one size but for the last.
        last: the frozen linear that ``block`` ends in, whose value no backward pass needs.
    """
    return _Tiled.apply(block, tile, last, x, *parameters)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        block: Callable[[Tensor], Tensor],
        tile: int,
        last: FrozenLinear | None,
        x: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.block, ctx.tile, ctx.last = block, tile, last
        ctx.save_for_backward(x, *parameters)
        if last is not None and not last.value_needed:
            return torch.zeros_like(x)  # the second pass of a layer, which reads no value of its last block
        out = torch.empty_like(x)
        for into, part in zip(_tiles(out, tile), _tiles(x, tile), strict=True):
            into.copy_(block(part))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        dx = torch.empty_like(x) if ctx.needs_input_grad[3] else None
        sums: list[Tensor] = []
        for number, (part, above) in enumerate(zip(_tiles(x, ctx.tile), _tiles(grad, ctx.tile), strict=True)):
            into = None if dx is None else _tiles(dx, ctx.tile)[number]
            found = _backward(ctx, part, parameters, above, into)
            sums = [total.add_(more) for total, more in zip(sums, found, strict=True)] if number else found
        return None, None, None, dx, *sums


def _backward(ctx: Any, part: Tensor, parameters: Sequence[Tensor], above: Tensor, into: Tensor | None) -> list[Tensor]:
    """Write a tile's gradient ``into`` its place, and return its share of those of the parameters."""
    part = part.detach().requires_grad_(into is not None)
    with torch.enable_grad(), ctx.last.value_unused() if ctx.last else nullcontext():
        y = ctx.block(part)
    if into is None:
        return list(torch.autograd.grad(y, parameters, above))
    below, *found = torch.autograd.grad(y, [part, *parameters], above)
    into.copy_(below)
    return found


def _tiles(x: Tensor, tile: int) -> tuple[Tensor, ...]:
    """Rows of ``x`` [..., H] as views [n, H]."""
    rows = x.reshape(-1, x.shape[-1])
    return rows.chunk(-(-len(rows) // tile))
