"""The homes of layers whose change is a low-rank update of weights that stay frozen."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from effitrain.adapters.attach import AdaptedLinear
from effitrain.adapters.base import Adapter
from effitrain.core.paths import layer_of
from effitrain.io.nf4 import NF4Tensor
from effitrain.model.decoder import Decoder
from effitrain.model.trained import train_layer
from effitrain.quant.linear import FrozenLinear
from effitrain.quant.nf4 import dequantize
from effitrain.train.homes import Seat, matrix_shapes, new_seat, take


class Deltas:
    """Layers whose change is kept as the LoRA on them: the best of its rank, by singular values.

    Args:
        decoder: with adapters on all linears of its layers, frozen.
        adapters: those, by module path.

    Attributes:
        errors: [L], the share of each layer's newest change's Frobenius norm that its low-rank form leaves out; a
            checkpoint holds them.
    """

    def __init__(self, decoder: Decoder, adapters: Mapping[str, Adapter]):
        self.decoder, self.adapters = decoder, adapters
        self.errors = torch.zeros(len(decoder.layers), dtype=torch.float64)
        self._adapted: dict[int, dict[str, AdaptedLinear]] = {}

    def seat(self) -> Seat:
        """The matrices of a layer: a LoRA holds no biases and no norms."""
        return new_seat(matrix_shapes(self.decoder.spec.layers[0]), self.decoder.device)

    def enter(self, layer: int, seat: Seat) -> None:
        """The sum of the frozen weights and the update; the adapters wait aside."""
        module, streamer = self.decoder.layers[layer], self.decoder.streamer
        self._adapted[layer] = {n: m for n, m in module.named_modules() if isinstance(m, AdaptedLinear)}
        for linear, adapted in self._adapted[layer].items():
            take(seat, f"{linear}.weight", self._frozen(layer, adapted.base) + adapted.adapter.delta_weight())
        train_layer(module, seat, keep_frozen=True)
        if streamer is not None and layer in streamer:
            streamer.rest(layer)

    def leave(self, layer: int, seat: Seat) -> None:
        """The adapters take over what they can of the change."""
        lost = whole = 0.0
        for linear, adapted in self._adapted[layer].items():
            change = seat[f"{linear}.weight"].detach() - self._frozen(layer, adapted.base)
            left, right = adapted.adapter.factors()
            left, right = low_rank(change, left.shape[1])
            adapted.adapter.load_factors(left / adapted.adapter.scaling, right)
            lost += float((change - left @ right).square().sum())
            whole += float(change.square().sum())
        self.errors[layer] = (lost / whole) ** 0.5 if whole else 0.0
        self.forget(layer, seat)

    def forget(self, layer: int, seat: Seat) -> None:
        """The adapters, as they are, take their places again."""
        adapted = self._adapted.pop(layer)
        for linear, module in adapted.items():
            self.decoder.layers[layer].set_submodule(linear, module)
        streamer = self.decoder.streamer
        if streamer is not None and layer in streamer.resting:
            streamer.wake(layer, [module.base for module in adapted.values()])

    def expect(self, layer: int) -> None:
        """Its adapters are there."""

    def waiting(self, active: tuple[int, ...]) -> dict[str, Tensor]:
        """All adapters, and the errors of their form."""
        return {**_factors(self.adapters), "rank_errors": self.errors}

    def trained(self) -> dict[str, Tensor]:
        """None: the model's own weights stay as they are."""
        return {}

    def facts(self) -> dict[str, Any]:
        """The largest error of the low-rank form."""
        return {"rank_error_share": self.errors.max().item()}

    def _frozen(self, layer: int, linear: FrozenLinear) -> Tensor:
        """The frozen weight in float32, from where it is."""
        weight: Any = linear.weight
        if weight is None:
            assert self.decoder.streamer is not None
            weight = self.decoder.streamer.host.weights(layer)[linear.spec.name]
        if isinstance(weight, NF4Tensor):
            return dequantize(weight.to(self.decoder.device), torch.float32)
        return weight.to(self.decoder.device, torch.float32)


class Adapters:
    """The adapters of a layer take the place of its weights: nothing else is trained."""

    def __init__(self, decoder: Decoder, adapters: Mapping[str, Adapter]):
        self.decoder, self.adapters = decoder, adapters
        for adapter in adapters.values():
            adapter.requires_grad_(False)

    def seat(self) -> Seat:
        """The tensors of a layer's adapters."""
        return new_seat({path: tuple(p.shape) for path, p in self._own(0).items()}, self.decoder.device)

    def enter(self, layer: int, seat: Seat) -> None:
        """The adapters compute with the seat."""
        for path, parameter in self._own(layer).items():
            take(seat, path, parameter)
            self._set(layer, path, seat[path])

    def leave(self, layer: int, seat: Seat) -> None:
        """They get tensors of their own again."""
        for path, parameter in seat.items():
            self._set(layer, path, nn.Parameter(parameter.detach().clone(), requires_grad=False))

    def forget(self, layer: int, seat: Seat) -> None:
        """The same."""
        self.leave(layer, seat)

    def expect(self, layer: int) -> None:
        """They are there."""

    def waiting(self, active: tuple[int, ...]) -> dict[str, Tensor]:
        """The tensors of all adapters but those of ``active``."""
        return _factors({path: adapter for path, adapter in self.adapters.items() if layer_of(path) not in active})

    def trained(self) -> dict[str, Tensor]:
        """None: the model's own weights stay as they are."""
        return {}

    def facts(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def _own(self, layer: int) -> dict[str, nn.Parameter]:
        named = self.decoder.layers[layer].named_parameters()
        return {path: parameter for path, parameter in named if ".adapter." in path}

    def _set(self, layer: int, path: str, parameter: nn.Parameter) -> None:
        module, _, leaf = path.rpartition(".")
        setattr(self.decoder.layers[layer].get_submodule(module), leaf, parameter)


def low_rank(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors L [out, rank] and R [rank, in] of the best approximation of ``change`` (Eckart and Young 1936), each
    with the root of the singular values; zeros where ``change`` has fewer.
    """
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    count = min(rank, len(s))
    root = s[:count].sqrt()
    left, right = change.new_zeros(len(change), rank), change.new_zeros(rank, change.shape[1])
    left[:, :count], right[:count] = u[:, :count] * root, root[:, None] * v[:count]
    return left, right


def _factors(adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    return {f"{path}.{name}": p for path, adapter in adapters.items() for name, p in adapter.named_parameters()}
