"""Loss and perplexity of a model on a token set."""

import math
from dataclasses import dataclass

import torch

from effitrain.core.errors import InputError
from effitrain.data.batches import Batches
from effitrain.model.decoder import Decoder
from effitrain.train.loss import loss_sum


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
def evaluate_loss(decoder: Decoder, batches: Batches) -> Evaluation:
    """One pass over ``batches`` in evaluation mode.

    Raises:
        InputError: the set has no trained token.
    """
    training = decoder.training
    decoder.eval()
    total, tokens = 0.0, 0
    for index in range(batches.per_epoch):
        batch = batches.get(index)
        if batch.trained_tokens:
            total += loss_sum(decoder, batch).item()
            tokens += batch.trained_tokens
    decoder.train(training)
    if not tokens:
        raise InputError("The evaluation set has no token to score.", next_step="Check --eval-dataset and --template.")
    return Evaluation(total / tokens, tokens)
