"""The home of layers of a model that is in NF4 or streams: what was trained is never quantised again."""

from typing import Any

import torch
from torch import Tensor

from effitrain.core.layout import layer_layout
from effitrain.core.paths import path_of
from effitrain.io.blob import views
from effitrain.model.decoder import Decoder
from effitrain.model.load import fill_layer, frozen_linears
from effitrain.model.trained import freeze_layer, layer_weights, train_layer
from effitrain.quant.read import Weights
from effitrain.stream.pinned import pinned_empty
from effitrain.train.homes import Seat, matrix_shapes, new_seat, take
from effitrain.train.sampling import full_precision


class OnHost:
    """Layers that stream from host memory in the compute dtype once they were trained; biases and norms stay.

    Args:
        decoder: with a streamer that has room for a layer in the compute dtype.
        original: the model's weights as the checkpoint has them, where a layer starts.
        quant: form of layers that were never trained.
        dtype: compute dtype.
        form: the same by its name in a recipe.
    """

    def __init__(self, decoder: Decoder, original: Weights, quant: str, dtype: torch.dtype, form: str):
        assert decoder.streamer is not None
        self.decoder, self.original, self.quant, self.dtype = decoder, original, quant, dtype
        self.streamer = decoder.streamer
        self.linears = {index: frozen_linears(layer) for index, layer in enumerate(decoder.layers)}
        self.layout = layer_layout(decoder.spec.layers[0], lambda linear: form)
        self.blobs: dict[int, dict[str, Any]] = {}
        self._streamed = frozenset(self.streamer.linears)

    def seat(self) -> Seat:
        """Every tensor of a layer."""
        small = {path: tuple(weight.shape) for path, weight in layer_weights(self.decoder.layers[0]).items()}
        return new_seat({**matrix_shapes(self.decoder.spec.layers[0]), **small}, self.decoder.device)

    def enter(self, layer: int, seat: Seat) -> None:
        """From host memory, or the first time from the checkpoint; the layer does not stream meanwhile."""
        self.streamer.rest(layer)
        for path, weight in layer_weights(self.decoder.layers[layer]).items():
            take(seat, path, weight)
        blob = self.blobs.get(layer)
        for path, shape in matrix_shapes(self.decoder.spec.layers[layer]).items():
            linear = path.removesuffix(".weight")
            stored = blob[linear] if blob else full_precision(self.original, path_of(layer, linear, "weight"), shape)
            take(seat, path, stored)
        train_layer(self.decoder.layers[layer], seat)

    def leave(self, layer: int, seat: Seat) -> None:
        """Rounded on the way to host memory; from now on the layer streams."""
        self._restore_small(layer, seat)
        self.expect(layer)
        for linear, place in self.blobs[layer].items():
            place.copy_(seat[f"{linear}.weight"].detach())

    def forget(self, layer: int, seat: Seat) -> None:
        """Read from the checkpoint again where it is resident; where it streams its bytes are where they were."""
        self._restore_small(layer, seat)
        if layer in self._streamed:
            self.streamer.wake(layer, self.linears[layer])
        else:
            fill_layer(self.decoder, layer, self.original, self.quant, self.dtype, self.decoder.device)

    def expect(self, layer: int) -> None:
        """Room in host memory, from where it streams."""
        if layer not in self.blobs:
            blob = pinned_empty((self.layout.nbytes,), torch.uint8, self.decoder.device)
            self.blobs[layer] = views(blob, self.layout)
            self.streamer.host.put(layer, self.layout, blob, self.decoder.device)
        for linear in self.linears[layer]:
            linear.weight = None
        self.streamer.wake(layer, self.linears[layer])

    def waiting(self, active: tuple[int, ...]) -> dict[str, Tensor]:
        """Host memory, and the layers' biases and norms."""
        found: dict[str, Tensor] = {}
        for layer in sorted(self.blobs.keys() - set(active)):
            matrices = {f"{linear}.weight": weight for linear, weight in self.blobs[layer].items()}
            tensors = {**matrices, **layer_weights(self.decoder.layers[layer])}
            found.update({path_of(layer, path): tensor for path, tensor in tensors.items()})
        return found

    def trained(self) -> dict[str, Tensor]:
        """Those of all visited layers."""
        return self.waiting(())

    def facts(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def _restore_small(self, layer: int, seat: Seat) -> None:
        small = {
            path: master for path, master in seat.items() if path not in matrix_shapes(self.decoder.spec.layers[layer])
        }
        weights = {path: master.detach().to(self.dtype, copy=True) for path, master in small.items()}
        freeze_layer(self.decoder.layers[layer], weights)
