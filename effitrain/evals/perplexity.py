"""Loss and perplexity of a model on a token set."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch

from effitrain.core.errors import InputError
from effitrain.data.batches import Batches, MicroBatch
from effitrain.model.decoder import Decoder
from effitrain.train.loss import loss_sums


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy over the trained tokens of a set, in nats, and how many there are."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@torch.no_grad()
def evaluate_loss(decoder: Decoder, batches: Batches, at_once: int = 1) -> Evaluation:
    """One pass over ``batches`` in evaluation mode.

    Args:
        decoder: with or without adapters.
        batches: what to score.
        at_once: micro-batches that pass a layer before the next one is needed.

    Raises:
        InputError: the set has no trained token.
    """
    total, tokens = 0.0, 0
    for group in scored(decoder, batches, at_once):
        for batch, loss in zip(group, loss_sums(decoder, group), strict=True):
            total += loss.item()
            tokens += batch.trained_tokens
    return Evaluation(total / tokens, tokens)


def scored(decoder: Decoder, batches: Batches, at_once: int) -> Iterator[list[MicroBatch]]:
    """The micro-batches that have a trained token, ``at_once`` at a time, while ``decoder`` is in evaluation mode.

    Raises:
        InputError: there is none.
    """
    training, found = decoder.training, False
    decoder.eval()
    every = (batch for batch in map(batches.get, range(batches.per_epoch)) if batch.trained_tokens)
    try:
        while group := list(islice(every, at_once)):
            found = True
            yield group
    finally:
        decoder.train(training)
    if not found:
        raise InputError(
            "The evaluation set has no token to score.",
            next_step="Every sample needs an answer: check the file, --columns and --template.",
        )
