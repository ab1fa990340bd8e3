"""SwiGLU: out = silu(gate) * up (Shazeer 2020), with silu(x) = x sigmoid(x).

Shapes: gate, up and out [..., F], one dtype. Saved for backward: gate and up; silu(gate) is computed again, which is
cheaper than keeping a fourth tensor of the widest size in the model.
d_up = d_out silu(gate);  d_gate = d_out up sigmoid(gate) (1 + gate (1 - sigmoid(gate))).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def reference(gate: Tensor, up: Tensor) -> Tensor:
    """The formula, left to autograd."""
    return F.silu(gate) * up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` [..., F], bit for bit ``reference`` in output and gradients."""
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)
