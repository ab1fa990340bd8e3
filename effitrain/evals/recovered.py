"""How much of a small model's gain arrives on the full-size model through the recovered adapter."""

from collections.abc import Callable
from typing import Any

import torch

from effitrain.adapters.storage import AdapterBundle
from effitrain.core.recipe import Recipe
from effitrain.data.batches import Batches
from effitrain.evals.perplexity import Evaluation
from effitrain.evals.walked import evaluate_walked
from effitrain.model.load import Base

Points = list[tuple[int, float]]


def compare(
    recipe: Recipe,
    base: Base,
    device: torch.device,
    batches: Batches,
    adapter: AdapterBundle,
    small: Points,
    tell: Callable[[str, Evaluation], None] = lambda when, evaluation: None,
) -> tuple[dict[str, Any], Points]:
    """The report's ``prune``, and the full model's losses before and after training, by step.

    Args:
        recipe: with every choice made.
        base: the full-size model.
        device: where a layer computes.
        batches: the evaluation set; where it is empty nothing is compared.
        adapter: the recovered one.
        small: losses of the small model by step.
        tell: told each evaluation of the full model.
    """
    points: Points = []
    if batches.per_epoch and small:
        ends = (("of the full model before", None, small[0]), ("of the full model after", adapter, small[-1]))
        for when, worn, (step, _) in ends:
            evaluation = evaluate_walked(base, recipe, device, batches, worn)
            tell(when, evaluation)
            points.append((step, evaluation.loss))
    return facts(recipe, small, points), points


def facts(recipe: Recipe, small: Points, full: Points) -> dict[str, Any]:
    """The report's ``prune``, from losses by step of the small model and, where there is an adapter, the full one."""
    gains = [losses[0][1] - losses[-1][1] for losses in (full, small) if losses]
    return {
        "ratio": recipe.prune_ratio,
        "parts": recipe.prune_parts,
        "small_before": small[0][1] if small else None,
        "small_after": small[-1][1] if small else None,
        "gain_share": gains[0] / gains[1] if len(gains) == 2 and gains[1] > 0 else None,
    }
