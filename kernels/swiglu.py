"""Gated activations (Shazeer 2020): SwiGLU, out = silu(gate) * up, and GeGLU with the tanh form of gelu.

Formula: both activations are a(g) = g s(g), s = sigmoid(z), with z = g for silu and z = 2 sqrt(2 / pi) (g + 0.044715
g^3) for gelu.  d_up = d_out a(gate);  d_gate = d_out up (s + gate s (1 - s) z').

Shapes: gate, up and out [..., F], one dtype; the kernels compute in float32. Saved for backward: gate and up; a(gate)
is computed again, which is cheaper than keeping a fourth tensor of the widest size in the model.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from effitrain.kernels.backend import tl, triton, usable

Activation = Literal["silu", "gelu"]
ELEMENTS = 1024  # of one program


def reference(gate: Tensor, up: Tensor, activation: Activation = "silu") -> Tensor:
    """The formula, left to autograd."""
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


@triton.jit
def _gate(g, GELU: tl.constexpr):
    """s(g) and dz/dg."""
    if GELU:
        z = 1.5957691216057308 * (g + 0.044715 * g * g * g)
        slope = 1.5957691216057308 * (1.0 + 0.134145 * g * g)
    else:
        z, slope = g, g * 0.0 + 1.0
    return 1.0 / (1.0 + tl.exp(-tl.maximum(z, -80.0))), slope  # exp(88) is infinite; s(-80) is 2e-35


@triton.jit
def _forward(gate_ptr, up_ptr, out_ptr, count, GELU: tl.constexpr, ELEMENTS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    g = tl.load(gate_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    u = tl.load(up_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    s, _ = _gate(g, GELU)
    tl.store(out_ptr + at, (g * s * u).to(out_ptr.dtype.element_ty), mask=at < count)


@triton.jit
def _backward(
    grad_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, out_ptr, count,
    GELU: tl.constexpr, OUT: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    d = tl.load(grad_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    g = tl.load(gate_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    u = tl.load(up_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    s, slope = _gate(g, GELU)
    dtype = dgate_ptr.dtype.element_ty
    tl.store(dgate_ptr + at, (d * u * (s + g * s * (1.0 - s) * slope)).to(dtype), mask=at < count)
    tl.store(dup_ptr + at, (d * g * s).to(dtype), mask=at < count)
    if OUT:
        tl.store(out_ptr + at, (g * s * u).to(dtype), mask=at < count)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(gate, up)
        return gated(gate, up, activation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        if usable("swiglu", gate, up):
            dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
            gated_backward(grad.contiguous(), gate.contiguous(), up.contiguous(), dgate, dup, None, ctx.activation)
            return dgate, dup, None
        if ctx.activation == "silu":
            return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad), None
        activated = F.gelu(gate, approximate="tanh")
        return torch.ops.aten.gelu_backward(grad * up, gate, approximate="tanh"), activated.mul_(grad), None


def gated(gate: Tensor, up: Tensor, activation: Activation = "silu") -> Tensor:
    """``a(gate) * up`` without a record for backward."""
    if usable("swiglu", gate, up):
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        _forward[(triton.cdiv(out.numel(), ELEMENTS),)](
            gate, up, out, out.numel(), GELU=activation == "gelu", ELEMENTS=ELEMENTS, num_warps=4
        )
        return out
    activated = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return activated.mul_(up)


def gated_backward(
    grad: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor, out: Tensor | None, activation: Activation
) -> None:
    """Write the gradients of ``gate`` and ``up``, and the product itself to ``out`` if asked.

    All are contiguous and of one dtype. The three results may lie in ``grad``, ``gate`` and ``up``, in any order: each
    element is read before it is written.
    """
    if not usable("swiglu", gate, up):
        g, u = (t.detach().requires_grad_() for t in (gate, up))
        with torch.enable_grad():
            product = reference(g, u, activation)
        found = torch.autograd.grad(product, (g, u), grad)
        for target, value in zip((dgate, dup, out), (*found, product.detach()), strict=True):
            if target is not None:
                target.copy_(value)
        return
    _backward[(triton.cdiv(grad.numel(), ELEMENTS),)](
        grad, gate, up, dgate, dup, grad if out is None else out, grad.numel(),
        GELU=activation == "gelu", OUT=out is not None, ELEMENTS=ELEMENTS, num_warps=4,
    )  # fmt: skip


def swiglu(gate: Tensor, up: Tensor, activation: Activation = "silu") -> Tensor:
    """``a(gate) * up`` [..., F]; on the CPU bit for bit ``reference`` in output and gradients."""
    return _SwiGLU.apply(gate, up, activation)
