"""Recompute a block of a decoder layer in the backward pass from its input alone, kept on the device or on the host."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from effitrain.quant.linear import FrozenLinear
from effitrain.stream.offload import Offload

Block = Callable[[Tensor], Tensor]
Hold = Callable[[], AbstractContextManager[None]]


def recompute(
    block: Block,
    x: Tensor,
    parameters: Sequence[Tensor],
    last: FrozenLinear,
    offload: Offload | None = None,
    hold: Hold = nullcontext,
) -> Tensor:
    """``block(x)``, keeping only ``x`` for backward.

    Args:
        block: a deterministic function of its input [B, T, H] and of ``parameters``, which ends in ``h + last(...)``.
        x: the block's input.
        parameters: the trainable tensors that ``block`` reads; they get gradients.
        last: the frozen linear whose output only enters the block's own. The second pass needs no value of it, which
            saves a quarter of that pass's work: ``down_proj`` holds 27 % of the weights of a Llama layer.
        offload: keeps ``x`` in host memory; None keeps it where it is.
        hold: within it the frozen weights are there; entered once for each of both passes.
    """
    return _Recompute.apply(block, last, offload, hold, x, *parameters)


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, block: Block, last: FrozenLinear, offload: Offload | None, hold: Hold, x: Tensor, *parameters: Tensor
    ) -> Tensor:
        ctx.block, ctx.last, ctx.offload, ctx.hold = block, last, offload, hold
        ctx.ticket = offload.put(x) if offload else None
        ctx.save_for_backward(*parameters, *(() if offload else (x,)))
        with hold():
            return block(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[4]
        parameters = ctx.saved_tensors[: len(ctx.needs_input_grad) - 5]
        x = ctx.offload.take(ctx.ticket) if ctx.offload else ctx.saved_tensors[-1]
        x = x.detach().requires_grad_(wanted)
        with ctx.hold():
            with torch.enable_grad(), ctx.last.value_unused():
                y = ctx.block(x)
            grads = torch.autograd.grad(y, [x, *parameters] if wanted else parameters, grad)
        return (None, None, None, None, *grads) if wanted else (None, None, None, None, None, *grads)
