"""What scores are made from: one layer's weights, and what calibration text did to its linears."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from effitrain.core.spec import Axis, LayerSpec
from effitrain.pruning.groups import members, per_group
from effitrain.quant.linear import FrozenLinear


@dataclass
class Seen:
    """One linear.

    Attributes:
        linear: the linear, while its layer is in memory.
        count: tokens seen.
        sums: float32 [in], inputs added up over tokens.
        squares: float32 [in], their squares.
        grad: float32 [out, in], gradient of the summed loss; None unless asked for.
    """

    linear: FrozenLinear
    count: int = 0
    sums: Tensor | None = None
    squares: Tensor | None = None
    grad: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """float32 [out, in]; where it is not stored so, a fresh tensor: a copy of every linear would be too much."""
        return self.linear.dense(torch.float32)

    def see(self, x: Tensor) -> None:
        """Take in inputs [..., in]."""
        x = x.detach().flatten(0, -2).float()
        sums, squares = x.sum(0), x.square().sum(0)
        self.sums = sums if self.sums is None else self.sums + sums
        self.squares = squares if self.squares is None else self.squares + squares
        self.count += len(x)

    def see_gradient(self, x: Tensor, grad: Tensor) -> None:
        """Add the weight's gradient for inputs [..., in] and gradients of the outputs [..., out]."""
        new = (grad.flatten(0, -2).t() @ x.flatten(0, -2)).float()
        self.grad = new if self.grad is None else self.grad + new


@dataclass(frozen=True)
class SeenLayer:
    """A layer's linears by name; ``linears`` is empty for scores that need nothing."""

    spec: LayerSpec
    num_kv_heads: int
    seed: int
    linears: Mapping[str, Seen]

    def groups(self, part: Axis) -> int:
        """How many groups ``part`` has."""
        if part == Axis.KV_HEADS:
            return self.num_kv_heads
        return next(linear.out_features for linear in self.spec.linears if linear.out_axis == part)

    def add_up(self, part: Axis, importance: Callable[[Seen, int], Tensor | None]) -> Tensor:
        """Sum over the members of ``part``, and over the channels of each group, of ``importance(seen, dim)``: one
        number per channel along ``dim``, or None for a member that does not count.
        """
        total = torch.zeros(self.groups(part))
        for member in members(self.spec, part):
            channels = importance(self.linears[member.linear.name], member.dim)
            if channels is not None:
                total += per_group(channels.float().cpu(), len(total))
        return total
