"""A gated MLP with low-rank updates as one function that keeps two wide tensors and reuses them in backward.

Formula, with a() silu or gelu (``swiglu``) and each linear as in ``lora_linear``:
    gate = G(x);  up = U(x);  h = a(gate) up;  y = D(h).
    dh from dy through D;  dgate = dh up a'(gate);  dup = dh a(gate);  dx = G's + U's share.

Shapes: x and y [..., H]; gate, up, h [..., F]. Saved for backward: gate, up, the three low [tokens, r], and x where A
of G or U is trained. h is made again. In backward h takes the place of dh, dgate that of gate and dup that of up: one
buffer of width F is new. Therefore backward runs once; a second time raises torch's error for changed tensors.
"""

from typing import Any

import torch
from torch import Tensor

from effitrain.kernels import lora_linear, swiglu
from effitrain.kernels.backend import rows_of, shaped, usable
from effitrain.kernels.lora_linear import Linear, down_gradient, input_gradient, low_gradients, project
from effitrain.kernels.swiglu import Activation, gated, gated_backward


def reference(x: Tensor, gate: Linear, up: Linear, down: Linear, activation: Activation = "silu") -> Tensor:
    """The formula, left to autograd."""
    h = swiglu.reference(lora_linear.reference(x, gate), lora_linear.reference(x, up), activation)
    return lora_linear.reference(h, down)


class _LoraMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, linears: tuple[Linear, Linear, Linear], activation: Activation, *tensors: Tensor | None
    ) -> Tensor:
        flat = rows_of(x)
        gate, low_gate = project(flat, linears[0])
        up, low_up = project(flat, linears[1])
        y, low_down = project(gated(gate, up, activation), linears[2])
        ctx.linears, ctx.activation, ctx.shape = linears, activation, x.shape
        keeps_x = ctx.needs_input_grad[3] or ctx.needs_input_grad[6]
        ctx.save_for_backward(flat if keeps_x else None, gate, up, low_gate, low_up, low_down)
        return shaped(y, *x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, gate, up, low_gate, low_up, low_down = ctx.saved_tensors
        wanted, grad = ctx.needs_input_grad[3:], rows_of(grad)
        dlow, dB, dmid = low_gradients(grad, low_down, ctx.linears[2], wanted[6:])
        h = dh = input_gradient(grad, dlow, ctx.linears[2])
        gated_backward(dh, gate, up, dgate=gate, dup=up, out=h, activation=ctx.activation)
        for changed in (gate, up):
            torch.autograd.graph.increment_version(changed)
        found = [down_gradient(h, dlow, ctx.linears[2]) if wanted[6] else None, dB, dmid]
        del h, dh
        dx = None
        for i, (dwide, low) in reversed(list(enumerate(((gate, low_gate), (up, low_up))))):
            linear, trained = ctx.linears[i], wanted[3 * i : 3 * i + 3]
            dlow, dB, dmid = low_gradients(dwide, low, linear, trained)
            found = [down_gradient(x, dlow, linear) if trained[0] else None, dB, dmid, *found]
            if ctx.needs_input_grad[0]:
                dx = input_gradient(dwide, dlow, linear, dx)
        return None if dx is None else dx.view(ctx.shape), None, None, *found


def lora_mlp(x: Tensor, gate: Linear, up: Linear, down: Linear, activation: Activation = "silu") -> Tensor:
    """``x`` [..., H] through a gated MLP, [..., H]; off Triton's devices it is ``reference``."""
    if not (x.numel() and usable("lora_mlp", x)):
        return reference(x, gate, up, down, activation)
    linears = (gate, up, down)
    return _LoraMLP.apply(x, linears, activation, *(tensor for linear in linears for tensor in linear.tensors))
