"""LoRA (Hu et al. 2021): delta W = s B A, with A [r, in] random, B [out, r] zero at the start, s = alpha / r."""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from effitrain.adapters.base import Adapter, AdapterConfig, Clock, LinearView, generator, seed_of
from effitrain.kernels.lora_linear import LowRank


class LoRA(Adapter):
    """Low-rank update of one linear."""

    axes: ClassVar = {"A": ("rank", "in"), "B": ("out", "rank")}

    def __init__(self, A: Tensor, B: Tensor, scaling: float, dropout: float, name: str, clock: Clock):
        super().__init__()
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.scaling, self.dropout, self.name, self.clock = scaling, dropout, name, clock

    @classmethod
    def build(cls, linear: LinearView, config: AdapterConfig, name: str, clock: Clock, device: torch.device) -> "LoRA":
        """A starts uniform in +-1/sqrt(in), peft's default (Kaiming with a = sqrt 5); B starts at zero."""
        A = torch.empty(config.r, linear.in_features)
        bound = 1 / math.sqrt(linear.in_features)
        A.uniform_(-bound, bound, generator=generator(A.device, clock.seed, name, "A"))
        B = torch.zeros(linear.out_features, config.r)
        return cls(A.to(device), B.to(device), config.scaling, config.dropout, name, clock)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """``y + s dropout(x) A^T B^T`` into ``y`` [N, out] or [B, T, out]; x and x A^T are kept for backward."""
        low = nn.functional.linear(self.dropped(x), self.A.to(x.dtype))
        up = self.B.to(x.dtype).t()
        if y.dim() == 2:
            return y.addmm_(low, up, alpha=self.scaling)
        return y.baddbmm_(low, up.expand(len(y), -1, -1), alpha=self.scaling)

    def low_rank(self) -> LowRank:
        """The same update; what dropout drops is drawn by counter."""
        dropout = self.dropout if self.training else 0.0
        return LowRank(self.A, self.B, self.scaling, dropout=dropout, seed=seed_of(*self._key()) % 2**31)

    def factors(self) -> tuple[Tensor, Tensor]:
        """B and A."""
        return self.B.detach(), self.A.detach()

    def load_factors(self, left: Tensor, right: Tensor) -> None:
        """Take B and A as they are."""
        with torch.no_grad():
            self.B.copy_(left)
            self.A.copy_(right)

    def dropped(self, x: Tensor) -> Tensor:
        """``x`` with elements dropped by counter, in training."""
        if not (self.dropout and self.training):
            return x
        source = generator(x.device, *self._key())
        keep = torch.rand(x.shape, generator=source, device=x.device) >= self.dropout
        return x * keep / (1 - self.dropout)

    def _key(self) -> tuple[int | str, ...]:
        """What decides which elements are dropped."""
        return self.clock.seed, self.clock.step, self.clock.micro_batch, self.name


ADAPTER = LoRA
