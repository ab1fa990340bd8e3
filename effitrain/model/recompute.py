"""Recompute a decoder layer in the backward pass from its input alone."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from effitrain.quant.linear import FrozenLinear

Layer = Callable[[Tensor], Tensor]


def recompute(layer: Layer, x: Tensor, parameters: Sequence[Tensor], last: FrozenLinear) -> Tensor:
    """``layer(x)``, keeping only ``x`` for backward.

    Args:
        layer: a deterministic function of its input [B, T, H] and of ``parameters``, which ends in ``h + last(...)``.
        x: the layer's input.
        parameters: the trainable tensors that ``layer`` reads; they get gradients.
        last: the frozen linear whose output only enters the layer's own. The second pass needs no value of it, which
            saves a quarter of that pass's work: ``down_proj`` holds 27 % of the weights of a Llama layer.
    """
    return _Recompute.apply(layer, last, x, *parameters)


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: Layer, last: FrozenLinear, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.layer, ctx.last = layer, last
        ctx.save_for_backward(x, *parameters)
        return layer(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        x = x.detach().requires_grad_(ctx.needs_input_grad[2])
        with torch.enable_grad(), ctx.last.value_unused():
            y = ctx.layer(x)
        inputs = [x, *parameters] if x.requires_grad else parameters
        grads = torch.autograd.grad(y, inputs, grad)
        return (None, None, *grads) if x.requires_grad else (None, None, None, *grads)
