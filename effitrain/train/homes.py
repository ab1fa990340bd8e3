"""Where a layer of LISA is while it is not trained, and in which form.

There are four answers. ``Resident``, here: rounded, on the device, in its own place. ``OnHost`` (``host_home.py``):
rounded, in host memory, from where it streams. ``Deltas`` (``adapter_homes.py``): what rounds changed is kept as a
low-rank update of the frozen weights. ``Adapters`` (there too): what is trained is the layer's adapters.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from effitrain.core.paths import path_of
from effitrain.core.spec import LayerSpec
from effitrain.model.decoder import Decoder
from effitrain.model.trained import freeze_layer, layer_weights, train_layer

Seat = dict[str, nn.Parameter]


class Home(Protocol):
    """Hands layers out to seats and takes them back."""

    def seat(self) -> Seat:
        """New float32 parameters on the device, one for each tensor of a layer that is trained, by path in it."""

    def enter(self, layer: int, seat: Seat) -> None:
        """``seat`` starts at the weights of ``layer``, which computes with it from now on."""

    def leave(self, layer: int, seat: Seat) -> None:
        """``layer`` computes with what ``seat`` holds, in the form of this home, from now on."""

    def forget(self, layer: int, seat: Seat) -> None:
        """As before ``enter``: nothing was trained."""

    def expect(self, layer: int) -> None:
        """``layer`` was trained in an earlier process; its values are written into the tensors of ``waiting``."""

    def waiting(self, active: tuple[int, ...]) -> dict[str, Tensor]:
        """By name in a checkpoint of the run, the tensors of the trained layers that are not ``active``."""

    def trained(self) -> dict[str, Tensor]:
        """By name in the model, the weights that training changed, when no layer is in a seat."""

    def facts(self) -> dict[str, Any]:
        """What a report should say of it."""


def new_seat(shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> Seat:
    """Parameters of these shapes."""
    return {path: nn.Parameter(torch.zeros(shape, device=device)) for path, shape in shapes.items()}


def take(seat: Seat, path: str, value: Tensor) -> None:
    """One tensor of ``seat`` starts at ``value``."""
    with torch.no_grad():
        seat[path].copy_(value)


def matrix_shapes(layer: LayerSpec) -> dict[str, tuple[int, ...]]:
    """The shapes of a layer's matrices, by path."""
    return {f"{linear.name}.weight": (linear.out_features, linear.in_features) for linear in layer.linears}


class Resident:
    """Layers of a model that is neither quantised nor streamed."""

    def __init__(self, decoder: Decoder, dtype: torch.dtype):
        self.decoder, self.dtype = decoder, dtype
        self.visited: set[int] = set()

    def seat(self) -> Seat:
        """Every tensor of a layer."""
        shapes = {path: tuple(weight.shape) for path, weight in layer_weights(self.decoder.layers[0]).items()}
        return new_seat(shapes, self.decoder.device)

    def enter(self, layer: int, seat: Seat) -> None:
        """The frozen weights are let go."""
        for path, weight in layer_weights(self.decoder.layers[layer]).items():
            take(seat, path, weight)
        train_layer(self.decoder.layers[layer], seat)

    def leave(self, layer: int, seat: Seat) -> None:
        """Rounded copies take their place."""
        self.visited.add(layer)
        self.forget(layer, seat)

    def forget(self, layer: int, seat: Seat) -> None:
        """The same: what was rounded before rounds to itself."""
        weights = {path: master.detach().to(self.dtype, copy=True) for path, master in seat.items()}
        freeze_layer(self.decoder.layers[layer], weights)

    def expect(self, layer: int) -> None:
        """Its tensors are there."""
        self.visited.add(layer)

    def waiting(self, active: tuple[int, ...]) -> dict[str, Tensor]:
        """The layers' own tensors."""
        layers = sorted(self.visited - set(active))
        return {
            path_of(layer, path): weight
            for layer in layers
            for path, weight in layer_weights(self.decoder.layers[layer]).items()
        }

    def trained(self) -> dict[str, Tensor]:
        """Those of all visited layers."""
        return self.waiting(())

    def facts(self) -> dict[str, Any]:
        """Nothing."""
        return {}
