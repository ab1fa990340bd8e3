"""Hidden states taken through a model one layer at a time: no more than one layer's weights are in memory.

Every micro-batch passes a layer before the next layer is read, so that the weights are read once, whatever the number
of micro-batches. Shapes: N tokens of a micro-batch, H hidden size.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effitrain.core.paths import EMBEDDING, HEAD
from effitrain.data.batches import MicroBatch
from effitrain.model.decoder import Decoder
from effitrain.model.load import fill_layer, fill_norm, frozen_linears, settle_threads
from effitrain.quant.linear import FrozenLinear
from effitrain.quant.read import Weights, read_dense


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
        self.decoder, self.weights, self.device = decoder, weights, device
        self.quant, self.dtype = quant, dtype
        settle_threads(decoder.spec, device)
        fill_norm(decoder, weights, dtype, device)

    def start(self, batches: Sequence[MicroBatch]) -> list[Passing]:
        """The micro-batches before the first layer."""
        embedding: Any = self.decoder.model.embed_tokens
        own = embedding.weight  # of an adapter that brings one
        if own is None:
            embedding.weight = self._table(EMBEDDING, torch.device("cpu"))
        passing = []
        for batch in batches:
            x = embedding(batch.input_ids[None])
            rope = self.decoder.model.rotary_emb(x.to(self.device), batch.position_ids[None].to(self.device))  # type: ignore[operator]
            passing.append(Passing(batch, x, {"position_embeddings": rope, "segments": batch.segments}))
        embedding.weight = own
        return passing

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Layer ``index``, filled within the block."""
        layer = self.decoder.layers[index]
        fill_layer(self.decoder, index, self.weights, self.quant, self.dtype, self.device)
        try:
            yield layer
        finally:
            _empty(layer)

    def tokens_within(self, space: int) -> int:
        """How many tokens' hidden states take ``space`` bytes of host memory."""
        return space // (self.decoder.spec.hidden * self.dtype.itemsize)

    def run(self, layer: nn.Module, passing: Passing) -> Tensor:
        """What ``layer`` makes of a micro-batch, [1, N, H] on the device."""
        return layer(passing.x.to(self.device), attention_mask=None, **passing.context)

    @contextmanager
    def head(self) -> Iterator[None]:
        """The head, filled within the block."""
        name = EMBEDDING if self.decoder.spec.tied else HEAD
        frozen(self.decoder.lm_head).weight = self._table(name, self.device)
        try:
            yield
        finally:
            _empty(self.decoder.lm_head)

    def _table(self, name: str, device: torch.device) -> Tensor:
        spec = self.decoder.spec
        return read_dense(self.weights, name, (spec.vocab, spec.hidden), self.dtype, device)


def grouped(batches: Iterable[MicroBatch], tokens: int) -> Iterator[list[MicroBatch]]:
    """The micro-batches in their order, in groups of at most ``tokens`` tokens, or of one that has more."""
    group: list[MicroBatch] = []
    held = 0
    for batch in batches:
        if group and held + len(batch.input_ids) > tokens:
            yield group
            group, held = [], 0
        group.append(batch)
        held += len(batch.input_ids)
    if group:
        yield group


def frozen(module: nn.Module) -> FrozenLinear:
    """The frozen linear that ``module`` is, or that an adapter wraps."""
    return frozen_linears(module)[0]


def _empty(module: nn.Module) -> None:
    for linear in frozen_linears(module):
        linear.weight = linear.bias = None
