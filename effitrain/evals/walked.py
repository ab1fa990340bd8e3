"""Loss of a model that need not fit anywhere: every micro-batch passes a layer before the next layer is read.

One layer is on the device and the hidden states of all evaluation tokens lie in host memory, so the weights are read
once, however much text there is.
"""

import torch

from effitrain.adapters.attach import attach
from effitrain.adapters.base import Clock
from effitrain.adapters.storage import AdapterBundle, load_into
from effitrain.core.recipe import Recipe
from effitrain.data.batches import Batches
from effitrain.evals.perplexity import Evaluation
from effitrain.kernels.linear_cross_entropy import linear_cross_entropy
from effitrain.model.decoder import build
from effitrain.model.load import Base
from effitrain.model.walk import Walk
from effitrain.quant.read import DTYPES


@torch.no_grad()
def evaluate_walked(
    base: Base, recipe: Recipe, device: torch.device, batches: Batches, adapter: AdapterBundle | None = None
) -> Evaluation:
    """One pass over ``batches``, which holds at least one trained token.

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
    decoder.eval()
    passing = walk.start([batches.get(index) for index in range(batches.per_epoch)])
    for index in range(base.spec.num_layers):
        with walk.layer(index) as layer:
            for one in passing:
                one.x = walk.run(layer, one).cpu()
    total = 0.0
    with walk.head():
        for one in passing:
            hidden = decoder.model.norm(one.x.to(device))[0]  # type: ignore[operator]
            total += linear_cross_entropy(hidden, decoder.lm_head, one.batch.labels, []).item()
    tokens = sum(one.batch.trained_tokens for one in passing)
    return Evaluation(total / tokens, tokens)
