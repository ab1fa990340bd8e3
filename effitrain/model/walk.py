"""Hidden states taken through a model one layer at a time: no more than one layer's weights are in memory.

Every micro-batch passes a layer before the next layer is read, so that the weights are read once, whatever the number
of micro-batches. Shapes: N tokens of a micro-batch, H hidden size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effitrain.data.batches import MicroBatch
from effitrain.model.decoder import Decoder
from effitrain.model.load import Filling, Weights, frozen


@dataclass
class Passing:
    """A micro-batch on its way: ``x`` [1, N, H], in host memory, is what the next layer gets."""

    batch: MicroBatch
    x: Tensor
    context: dict[str, Any]


class Walk:
    """A model whose layers are filled when they are visited and emptied afterwards.

    Args:
        decoder: from ``build``, empty; adapters may be on it.
        weights: where the tensors come from.
        quant: ``nf4`` or ``none``, the form of the weights while they are used.
        dtype: compute dtype.
        device: where a layer computes.
    """

    def __init__(self, decoder: Decoder, weights: Weights, quant: str, dtype: torch.dtype, device: torch.device):
        self.decoder, self.device = decoder, device
        self._filling = Filling(weights, quant, dtype, device)
        self._filling.rest(decoder)

    def start(self, batches: Sequence[MicroBatch]) -> list[Passing]:
        """The micro-batches before the first layer."""
        self._filling.embedding(self.decoder, on_host=True)
        passing = []
        for batch in batches:
            x, context = self.decoder.embed(batch.input_ids, batch.position_ids, batch.segments)
            passing.append(Passing(batch, x.cpu(), context))
        embedding: Any = self.decoder.model.embed_tokens
        embedding.weight = None
        return passing

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Layer ``index``, filled within the block."""
        layer = self.decoder.layers[index]
        self._filling.layer(self.decoder, index)
        try:
            yield layer
        finally:
            for linear in self.decoder.spec.layers[index].linears:
                _empty(layer.get_submodule(linear.name))

    def run(self, layer: nn.Module, passing: Passing) -> Tensor:
        """What ``layer`` makes of a micro-batch, [1, N, H] on the device."""
        return self.decoder.run(layer, passing.x.to(self.device), passing.context)

    @contextmanager
    def head(self) -> Iterator[None]:
        """The head, filled within the block."""
        self._filling.head(self.decoder)
        try:
            yield
        finally:
            _empty(self.decoder.lm_head)


def _empty(module: nn.Module) -> None:
    linear = frozen(module)
    linear.weight = linear.bias = None
