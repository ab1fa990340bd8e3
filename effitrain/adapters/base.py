"""The contract of an adapter: the tensors and the algebra of an update to one frozen linear, and nothing of training.

A variant is one file that sets ``ADAPTER`` to its class; ``variants.py`` says where it lies. The contract test runs
over all of them.

Shapes: x [..., in], y [..., out]; factors L [out, k] and R [k, in] with delta W = scaling L R.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from effitrain.core.methods import adapter_kind
from effitrain.core.recipe import Recipe
from effitrain.kernels.lora_linear import LowRank


class LinearView(Protocol):
    """All that an adapter may know of the linear it changes: it may be quantised, streamed or pruned."""

    in_features: int
    out_features: int

    def matmul(self, x: Tensor) -> Tensor:
        """Product with the frozen weight, plus the bias."""

    def weight_slice(self, rows: Any, columns: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        """A part of the weight [rows, columns]."""


@dataclass(frozen=True)
class AdapterConfig:
    """What a user chooses of an adapter; ``targets`` None means every linear of the decoder."""

    kind: str = "lora"
    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None
    rslora: bool = False

    @property
    def scaling(self) -> float:
        """The factor on the update: alpha / r, or alpha / sqrt(r) (Kalajdzievski 2023, rsLoRA)."""
        return self.alpha / (self.r**0.5 if self.rslora else self.r)

    @classmethod
    def of(cls, recipe: Recipe) -> "AdapterConfig":
        """The adapter that ``recipe`` asks for."""
        kind = adapter_kind(recipe.method)
        assert kind is not None
        return cls(
            kind=kind,
            r=recipe.lora_r,
            alpha=recipe.lora_r if recipe.method == "lisa-delta" else recipe.lora_alpha,
            dropout=recipe.lora_dropout,
            targets=recipe.lora_targets,
            rslora=recipe.lora_rslora,
        )


@dataclass
class Clock:
    """Where training stands: with the module's name it keys every random choice, so recomputation repeats it."""

    seed: int = 0
    step: int = 0
    micro_batch: int = 0

    def at_micro_batch(self, number: int) -> None:
        """Training goes on with micro-batch ``number`` of the step."""
        self.micro_batch = number


def seed_of(*key: int | str) -> int:
    """A seed below 2^63 that depends on ``key`` alone."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, key)).encode()).digest()[:8], "little") >> 1


def generator(device: torch.device, *key: int | str) -> torch.Generator:
    """A random generator that depends on ``key`` alone, never on what was drawn before."""
    return torch.Generator(device).manual_seed(seed_of(*key))


class Adapter(nn.Module):
    """Base of all variants. Trainable tensors are float32 parameters.

    Class attributes:
        axes: for every tensor, the axis of each of its dimensions: ``rank``, ``in`` or ``out``. Recovery of a pruned
            adapter, checkpoints and sharding read this table.
        scaling: factor on the update, that of the config.
    """

    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    scaling: float

    @classmethod
    def build(
        cls, linear: LinearView, config: AdapterConfig, name: str, clock: Clock, device: torch.device
    ) -> "Adapter":
        """A fresh adapter for ``linear``, whose update is zero; ``name`` and ``clock.seed`` decide its random start."""
        raise NotImplementedError

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """``y`` plus the update's share, [..., out]; may write into ``y``, the fresh output of the frozen linear."""
        raise NotImplementedError

    def low_rank(self) -> LowRank | None:
        """The update as the fused kernels take it, in place of ``forward``; None when it has another form."""
        return None

    def factors(self) -> tuple[Tensor, Tensor]:
        """L [out, k] and R [k, in] in float32, detached: delta W = scaling L R."""
        raise NotImplementedError

    def delta_weight(self) -> Tensor:
        """The update of the weight, [out, in], float32."""
        left, right = self.factors()
        return self.scaling * (left @ right)

    def load_factors(self, left: Tensor, right: Tensor) -> None:
        """Take over an update given as factors L [out, r] and R [r, in], such as peft's B and A."""
        raise NotImplementedError


def recover(tensor: Tensor, axes: Sequence[str], kept: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Tensor:
    """Scatter a pruned tensor to its full shape along its named axes, zeros elsewhere.

    Args:
        tensor: as trained on the pruned model.
        axes: the axis of each dimension, from the adapter's ``axes``.
        kept: indices that survived, for the axes that were pruned.
        sizes: full size of those axes.
    """
    for dim, axis in enumerate(axes):
        if axis in kept:
            shape = list(tensor.shape)
            shape[dim] = sizes[axis]
            tensor = tensor.new_zeros(shape).index_copy_(dim, kept[axis], tensor)
    return tensor
