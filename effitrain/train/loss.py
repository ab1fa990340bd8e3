"""Losses of micro-batches: hidden states from the decoder, head and cross-entropy in chunks.

Sums, not means: the caller divides by the trained tokens of the whole step, so accumulation never changes the loss.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from effitrain.data.batches import MicroBatch
from effitrain.kernels.linear_cross_entropy import linear_cross_entropy
from effitrain.model.decoder import Decoder, Rows


def loss_sum(decoder: Decoder, batch: MicroBatch) -> Tensor:
    """Sum of the cross-entropies of the batch's trained tokens, float32."""
    return next(loss_sums(decoder, [batch]))


def loss_sums(decoder: Decoder, group: Sequence[MicroBatch]) -> Iterator[Tensor]:
    """The same of each of several micro-batches, all of which pass a layer before the next layer is needed."""
    return (_of_hidden(decoder, *pair) for pair in zip(hidden_states(decoder, group), group, strict=True))


def hidden_states(decoder: Decoder, group: Sequence[MicroBatch]) -> Iterator[Tensor]:
    """Final hidden states of each of several micro-batches, which pass the layers as for ``loss_sums``."""
    ends = decoder.through([Rows(batch.input_ids, batch.position_ids, batch.segments) for batch in group])
    return map(decoder.finish, ends)


def backward_in_groups(
    decoder: Decoder, micro: Sequence[MicroBatch], turn: Callable[[int], None], at_once: int = 1
) -> list[Tensor]:
    """Forward and backward, ``at_once`` micro-batches at a time; their loss sums. Gradients are added up in their
    order, whatever the groups. ``turn`` is told each one's number.
    """
    losses: list[Tensor] = []
    for first in range(0, len(micro), at_once):
        group = micro[first : first + at_once]
        backward = backward_by_layer if len(group) > 1 else backward_by_batch
        losses += backward(decoder, group, lambda number, first=first: turn(first + number))  # type: ignore[misc]
    return losses


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
        earlier = [p for p in decoder.layers.parameters() if p.grad is not None]
        before = [_Before.apply(*earlier)] if earlier else []
        torch.autograd.backward([*ends, *before], [*(leaf.grad for leaf in leaves), *map(torch.ones_like, before)])
    return losses


class _Before(torch.autograd.Function):
    """The gradients of earlier micro-batches, taken off the parameters, as the first that a backward pass adds up.

    Autograd sums what comes in one pass before it adds the sum to what is there: a group would round in another order
    than its micro-batches one by one. Of the nodes that are ready the newest runs first, so this one must be made last.
    It is for the layers alone: head and last norm have had their passes, and a trained embedding adds by itself.
    """

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        ctx.grads = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, unused: Tensor) -> tuple[Tensor, ...]:
        grads, ctx.grads = ctx.grads, None
        return tuple(grads)


def _of_hidden(decoder: Decoder, hidden: Tensor, batch: MicroBatch) -> Tensor:
    head = decoder.lm_head
    trainable = [p for p in head.parameters() if p.requires_grad]
    return linear_cross_entropy(hidden, head, batch.labels, trainable, rows=batch.trained_rows)
