"""Loss by position in the sample: how much a model makes of a long context, and where it stops understanding it."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from effitrain.data.batches import Batches
from effitrain.evals.perplexity import Evaluation, evaluate_loss, scored
from effitrain.kernels.linear_cross_entropy import linear_cross_entropy
from effitrain.model.decoder import Decoder
from effitrain.train.loss import hidden_states

LEAST_BUCKET, BUCKETS = 256, 8  # of a default bucket: tokens at least, and how many cover the longest sample


@dataclass(frozen=True)
class Bucket:
    """Mean cross-entropy, in nats, of the ``tokens`` predicted from positions ``start`` to ``end - 1``.

    Position p sees p tokens before it in its sample. Tokens that are not trained are left out.
    """

    start: int
    end: int
    loss: float
    tokens: int


@dataclass(frozen=True)
class Scored:
    """What a pass over a set found: ``buckets`` where positions were told apart, ``warning`` of samples too long."""

    evaluation: Evaluation
    buckets: tuple[Bucket, ...] = ()
    warning: str | None = None


@dataclass(frozen=True)
class ByPosition:
    """The losses of a run before training and after it, bucket by bucket; ``warning`` is of samples too long."""

    before: tuple[Bucket, ...]
    after: tuple[Bucket, ...]
    warning: str | None = None

    def rows(self) -> list[dict[str, Any]]:
        """As the report has them."""
        ends = zip(self.before, self.after, strict=True)
        return [
            {"start": b.start, "end": b.end, "tokens": b.tokens, "before": b.loss, "after": a.loss} for b, a in ends
        ]


def default_bucket(longest: int, max_positions: int) -> int:
    """Tokens of a bucket for samples of up to ``longest`` tokens; the model's last position is a border where they are
    longer.
    """
    size = max(LEAST_BUCKET, -(-longest // BUCKETS))
    if longest <= max_positions:
        return size
    within = -(-max_positions // size)  # buckets up to there, as a power of two, as lengths are
    return max(1, max_positions // (1 << (within - 1).bit_length()))


def longest_sample(batches: Batches) -> int:
    """Tokens of the longest sample, 0 where there is none."""
    return int(batches.token_set.lengths.max(initial=0))


def score(decoder: Decoder, batches: Batches, at_once: int, bucket: int | Literal["auto"] | None = None) -> Scored:
    """One pass over ``batches``, ``at_once`` micro-batches at a time.

    Args:
        decoder: with or without adapters.
        batches: what to score.
        at_once: micro-batches that pass a layer before the next one is needed.
        bucket: positions of a bucket; by default only samples longer than the model was made for are told apart.

    Raises:
        InputError: the set has no trained token.
    """
    longest, made_for = longest_sample(batches), decoder.spec.max_positions
    if bucket is None and longest <= made_for:
        return Scored(evaluate_loss(decoder, batches, at_once))
    size = bucket if isinstance(bucket, int) else default_bucket(longest, made_for)
    buckets = loss_by_position(decoder, batches, size, at_once)
    return Scored(overall(buckets), buckets, beyond_its_length(buckets, longest, made_for))


@torch.no_grad()
def loss_by_position(decoder: Decoder, batches: Batches, bucket: int, at_once: int = 1) -> tuple[Bucket, ...]:
    """One pass over ``batches`` in evaluation mode: the buckets of ``bucket`` positions that hold a trained token.

    ``at_once`` micro-batches pass a layer before the next one is needed.

    Raises:
        InputError: the set has no trained token.
    """
    sums: dict[int, float] = defaultdict(float)
    counts: dict[int, int] = defaultdict(int)
    for group in scored(decoder, batches, at_once):
        for batch, hidden in zip(group, hidden_states(decoder, group), strict=True):
            where = batch.position_ids[batch.trained_rows] // bucket
            for number in where.unique().tolist():
                rows = batch.trained_rows[where == number]
                sums[number] += linear_cross_entropy(hidden, decoder.lm_head, batch.labels, rows=rows).item()
                counts[number] += len(rows)
    return tuple(Bucket(n * bucket, (n + 1) * bucket, sums[n] / counts[n], counts[n]) for n in sorted(sums))


def overall(buckets: Sequence[Bucket]) -> Evaluation:
    """All buckets together."""
    tokens = sum(bucket.tokens for bucket in buckets)
    return Evaluation(sum(bucket.loss * bucket.tokens for bucket in buckets) / tokens, tokens)


def beyond_its_length(buckets: Sequence[Bucket], longest: int, max_positions: int) -> str | None:
    """What to say of samples of ``longest`` tokens where the model was made for ``max_positions``; None up to there."""
    if longest <= max_positions:
        return None
    sides = [b for b in buckets if b.end <= max_positions], [b for b in buckets if b.start >= max_positions]
    fact = f"Samples of up to {longest} tokens are longer than the {max_positions} positions the model was made for"
    if not all(sides):
        return f"{fact}."
    within, beyond = (overall(side).loss for side in sides)
    return f"{fact}: its loss is {within:.3f} up to there and {beyond:.3f} beyond."
