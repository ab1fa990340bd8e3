"""Losses of micro-batches: hidden states from the decoder, head and cross-entropy in chunks.

Sums, not means: the caller divides by the trained tokens of the whole step, so accumulation never changes the loss.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from effitrain.data.batches import MicroBatch
from effitrain.kernels.linear_cross_entropy import linear_cross_entropy
from effitrain.model.decoder import Decoder, Rows


def loss_sum(decoder: Decoder, batch: MicroBatch) -> Tensor:
    """Sum of the cross-entropies of the batch's trained tokens, float32."""
    return _of_hidden(decoder, decoder(batch.input_ids, batch.position_ids, batch.segments), batch)


def backward_by_batch(decoder: Decoder, micro: Sequence[MicroBatch], turn: Callable[[int], None]) -> list[Tensor]:
    """Forward and backward of one micro-batch after the other; their loss sums. ``turn`` is told each one's number."""
    losses = []
    for number, batch in enumerate(micro):
        turn(number)
        loss = loss_sum(decoder, batch)
        if batch.trained_tokens:
            loss.backward()
        losses.append(loss.detach())
    return losses


def backward_by_layer(decoder: Decoder, micro: Sequence[MicroBatch], turn: Callable[[int], None]) -> list[Tensor]:
    """The same losses and gradients, bit for bit, with all micro-batches passing a layer before the next layer is
    needed: a streamed layer is copied once a step and direction, and every micro-batch's layer inputs are kept.
    """
    trained = [number for number, batch in enumerate(micro) if batch.trained_tokens]
    losses = [torch.zeros((), device=decoder.device) for _ in micro]
    rows = [Rows(micro[n].input_ids, micro[n].position_ids, micro[n].segments) for n in trained]
    ends = decoder.through(rows, lambda place: turn(trained[place]))
    leaves = [end.detach().requires_grad_(end.requires_grad) for end in ends]
    for number, leaf in zip(trained, leaves, strict=True):
        turn(number)
        loss = _of_hidden(decoder, decoder.finish(leaf), micro[number])
        loss.backward()
        losses[number] = loss.detach()
    if any(end.requires_grad for end in ends):
        torch.autograd.backward(ends, [leaf.grad for leaf in leaves])
    return losses


def _of_hidden(decoder: Decoder, hidden: Tensor, batch: MicroBatch) -> Tensor:
    head = decoder.lm_head
    trainable = [p for p in head.parameters() if p.requires_grad]
    return linear_cross_entropy(hidden, head, batch.labels, trainable, rows=batch.trained_rows)
