"""Layers made from a checkpoint, or from nothing but a seed, when they are asked for."""

import torch
from torch import Tensor

from effitrain.core.layout import NF4, Field, Layout, layer_layout
from effitrain.core.paths import path_of
from effitrain.core.spec import ModelSpec
from effitrain.io.blob import Weight, parts_of, views
from effitrain.quant.read import DTYPES, Weights, read_frozen


class FreshLayers:
    """The frozen linears of ``spec``, read from ``weights`` and stored as ``quant`` (``nf4``, ``none``) and ``dtype``
    (``bf16``, ``fp16``, ``fp32``) say; what ``weights`` has in NF4 stays as it is. They are quantised on ``device``, as
    resident layers are: a card is faster, and one weight in thousands gets another code there than on a CPU.
    """

    def __init__(self, spec: ModelSpec, weights: Weights, quant: str, dtype: str, device: torch.device | str = "cpu"):
        self.spec, self.weights, self.quant, self.dtype, self.device = spec, weights, quant, dtype, device

    def layout(self, layer: int) -> Layout:
        """How the bytes of ``layer`` are laid out."""
        return layer_layout(self.spec.layers[layer], lambda linear: self._form(path_of(layer, linear, "weight")))

    def weight(self, layer: int, field: Field) -> Weight:
        """One weight of ``layer``, on the device.

        Raises:
            InputError: it is missing, has another shape, or holds NaN or infinity.
        """
        name = path_of(layer, field.name, "weight")
        return read_frozen(self.weights, name, field.shape, self.quant, DTYPES[self.dtype], self.device)

    def read_into(self, layer: int, target: Tensor) -> None:
        """Write the bytes of ``layer`` into ``target``."""
        layout = self.layout(layer)
        places = views(target, layout)
        for field in layout.fields:
            for place, part in zip(parts_of(places[field.name]), parts_of(self.weight(layer, field)), strict=True):
                place.copy_(part)

    def read_ahead(self, layer: int) -> None:
        """Nothing is made before it is needed."""

    def _form(self, name: str) -> str:
        return NF4 if self.quant == NF4 or self.weights.is_nf4(name) else self.dtype
