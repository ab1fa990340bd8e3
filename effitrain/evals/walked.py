"""Loss of a model that need not fit anywhere: many micro-batches pass a layer before the next layer is read.

One layer is on the device, and hidden states lie in host memory up to a bound: the weights are read once for that much
text, and again for the next.
"""

from collections.abc import Callable, Iterator

import torch

from effitrain.adapters.attach import attach
from effitrain.adapters.base import Clock
from effitrain.adapters.full import load_in_full
from effitrain.adapters.storage import AdapterBundle, load_into
from effitrain.core.recipe import Recipe
from effitrain.data.batches import Batches, MicroBatch
from effitrain.evals.perplexity import Evaluation
from effitrain.kernels.linear_cross_entropy import linear_cross_entropy
from effitrain.model.decoder import build
from effitrain.model.load import Base
from effitrain.model.walk import Walk, grouped
from effitrain.quant.read import DTYPES

# Bytes: 262,144 tokens of a 70B model in bf16, so that the default evaluation set (200 rows of 2,048 tokens at most) is
# two passes over its weights.
_HIDDEN_STATES = 4 * 2**30


@torch.no_grad()
def evaluate_walked(
    base: Base, recipe: Recipe, device: torch.device, batches: Batches, adapter: AdapterBundle | None = None
) -> Evaluation:
    """Loss on ``batches``, which hold at least one trained token.

    Args:
        base: with its files on disk.
        recipe: with its dtype chosen; ``quant`` is the form of the weights while they are used.
        device: where a layer computes.
        batches: what to score.
        adapter: of this model.
    """
    dtype = DTYPES[recipe.dtype]
    decoder = build(base.spec, base.source.config, base.name)
    walk = Walk(decoder, base.weights(recipe.quant, dtype), recipe.quant, dtype, device)
    if adapter:
        load_into(attach(decoder, adapter.config, Clock()), adapter, "recovered from the small model")
        load_in_full(decoder, adapter.full)
    decoder.eval()
    every = (batches.get(index) for index in range(batches.per_epoch))
    total, tokens = 0.0, 0
    for group in grouped(every, walk.tokens_within(_HIDDEN_STATES)):
        total = sum(_losses(walk, group), total)
        tokens += sum(batch.trained_tokens for batch in group)
    return Evaluation(total / tokens, tokens)


def ends(
    recipe: Recipe,
    before: Base,
    after: Base,
    device: torch.device,
    batches: Batches,
    points: list[tuple[int, float]],
    tell: Callable[[str, Evaluation], None] = lambda when, evaluation: None,
) -> list[tuple[int, float]]:
    """The first and last of ``points`` (step, loss) with the losses of whole models in full precision.

    Args:
        recipe: with its dtype chosen.
        before: the model before training.
        after: the model that training left.
        device: where a layer computes.
        batches: the evaluation set; where it is empty there are no points.
        points: of the model as it was trained.
        tell: told each evaluation.
    """
    plain, found = recipe.changed(quant="none"), []
    for (step, _), base, when in zip(points[:1] + points[-1:], (before, after), ("before", "after"), strict=False):
        evaluation = evaluate_walked(base, plain, device, batches)
        tell(f"of the whole model {when}", evaluation)
        found.append((step, evaluation.loss))
    return found


def _losses(walk: Walk, group: list[MicroBatch]) -> Iterator[float]:
    """The summed loss of each micro-batch, after one pass over the layers."""
    passing = walk.start(group)
    for index in range(walk.decoder.spec.num_layers):
        with walk.layer(index) as layer:
            for one in passing:
                one.x = walk.run(layer, one).cpu()
    with walk.head():
        for one in passing:
            hidden = walk.decoder.model.norm(one.x.to(walk.device))[0]  # type: ignore[operator]
            yield linear_cross_entropy(hidden, walk.decoder.lm_head, one.batch.labels, []).item()
