"""The one frozen linear that an adapter ever meets: NF4 or plain, never trained, never saved for backward."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effitrain.core.spec import LinearSpec
from effitrain.io.nf4 import NF4Tensor
from effitrain.kernels import nf4_linear
from effitrain.kernels.backend import shaped
from effitrain.kernels.lora_linear import Linear
from effitrain.quant.nf4 import dequantize


class FrozenLinear(nn.Module):
    """``y = x W^T + b`` with frozen ``W`` [out, in].

    The weight is an attribute and not a parameter: whoever fills the model decides where it lives, and nothing that
    walks over parameters moves, casts or counts it. Until it is filled, ``weight`` is None.
    """

    def __init__(self, spec: LinearSpec):
        super().__init__()
        self.spec = spec
        self.in_features, self.out_features = spec.in_features, spec.out_features
        self.weight: Tensor | NF4Tensor | None = None
        self.bias: Tensor | None = None
        self.value_needed = True

    def as_linear(self) -> Linear:
        """This linear, without an update, as the kernels see it."""
        return Linear(self)

    def forward(self, x: Tensor) -> Tensor:
        """Same as ``matmul``."""
        return self.matmul(x)

    def matmul(self, x: Tensor) -> Tensor:
        """``x`` [..., in] times the frozen weight, [..., out]; differentiable in ``x`` only."""
        return _FrozenMatmul.apply(x, self)

    def product(self, x: Tensor) -> Tensor:
        """The value of ``matmul``, without a record for backward; zeros while nobody reads it."""
        if not self.value_needed:
            return x.new_zeros(*x.shape[:-1], self.out_features)
        weight = self.weight
        if isinstance(weight, NF4Tensor) and nf4_linear.fused(x, weight):
            return nf4_linear.product(x, weight, self.bias)
        return F.linear(x, self.dense(x.dtype), self.bias)

    def transposed_product(self, grad: Tensor, into: Tensor | None = None) -> Tensor:
        """``grad`` [..., out] times the weight itself, [..., in]; added to ``into`` [M, in] if given."""
        weight = self.weight
        if isinstance(weight, NF4Tensor) and nf4_linear.fused(grad, weight):
            return nf4_linear.transposed_product(grad, weight, into)
        dense = self.dense(grad.dtype)
        return grad @ dense if into is None else into.addmm_(grad, dense)

    @contextmanager
    def value_unused(self) -> Iterator[None]:
        """Within it ``matmul`` gives zeros of the right shape, with the right gradient: nobody reads the value."""
        self.value_needed = False
        try:
            yield
        finally:
            self.value_needed = True

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] in ``dtype``: a fresh tensor for NF4, the stored one when it already has that dtype."""
        if self.weight is None:
            raise RuntimeError(f"{self.spec.name} was used before its weight was loaded")
        if isinstance(self.weight, NF4Tensor):
            return dequantize(self.weight, dtype)
        return self.weight.to(dtype)

    def weight_slice(self, rows: Any, columns: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        """A part of the weight: ``rows`` and ``columns`` are slices or index tensors."""
        return self.dense(dtype)[rows][:, columns]

    def extra_repr(self) -> str:
        """Sizes and storage, as torch prints a module."""
        kind = "nf4" if isinstance(self.weight, NF4Tensor) else getattr(self.weight, "dtype", "empty")
        return f"{self.in_features}, {self.out_features}, {kind}"


class _FrozenMatmul(torch.autograd.Function):
    """Keeps the linear and no tensor: in backward the weight is asked for again, wherever it then lives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: FrozenLinear) -> Tensor:
        ctx.linear = linear
        y = linear.product(x.reshape(-1, x.shape[-1]))
        return shaped(y, *x.shape[:-1], linear.out_features)  # adapters add to it in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.linear.transposed_product(grad), None
