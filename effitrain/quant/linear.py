"""The one frozen linear that an adapter ever meets: NF4 or plain, never trained, never saved for backward."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effitrain.core.spec import LinearSpec
from effitrain.io.nf4 import NF4Tensor
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
        self._value_needed = True

    def forward(self, x: Tensor) -> Tensor:
        """Same as ``matmul``."""
        return self.matmul(x)

    def matmul(self, x: Tensor) -> Tensor:
        """``x`` [..., in] times the frozen weight, [..., out]; differentiable in ``x`` only."""
        return _FrozenMatmul.apply(x, self)

    @contextmanager
    def value_unused(self) -> Iterator[None]:
        """Within it ``matmul`` gives zeros of the right shape, with the right gradient: nobody reads the value."""
        self._value_needed = False
        try:
            yield
        finally:
            self._value_needed = True

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
        kind = "nf4" if isinstance(self.weight, NF4Tensor) else getattr(self.weight, "dtype", "empty")
        return f"{self.in_features}, {self.out_features}, {kind}"


class _FrozenMatmul(torch.autograd.Function):
    """Keeps the linear and no tensor: in backward the weight is asked for again, wherever it then lives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: FrozenLinear) -> Tensor:
        ctx.linear = linear
        if not linear._value_needed:
            return x.new_zeros(*x.shape[:-1], linear.out_features)
        y = F.linear(x.reshape(-1, x.shape[-1]), linear.dense(x.dtype), linear.bias)
        # Adapters add to the output in place, which autograd forbids for a view made in here; F.linear of three
        # dimensions gives one when there is a bias.
        return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], linear.out_features])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.linear.dense(grad.dtype), None
