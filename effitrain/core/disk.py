"""What a run writes to its output folder, in bytes, from integers alone."""

from effitrain.core.cut import small_spec
from effitrain.core.memory import adapter_factors, nf4_bytes
from effitrain.core.methods import CHANGES_MODEL
from effitrain.core.plan import Plan
from effitrain.core.recipe import Recipe
from effitrain.core.spec import ModelSpec
from effitrain.core.weights import elements

# Lines of the ledger that a checkpoint holds as they are. What grows as rows and layers are met is left out.
_CHECKPOINTED = ("adapter weights", "trained weights", "embedding, trained", "optimizer states")


def save_interval(recipe: Recipe, steps: int) -> int:
    """Steps from one checkpoint to the next: the recipe's, else a tenth of the run."""
    return recipe.save_every or max(1, steps // 10)


def output_bytes(spec: ModelSpec, recipe: Recipe, plan: Plan, steps: int) -> int:
    """The most that the output folder holds at a time: a new checkpoint beside those that are kept, or those and what
    the run is for; beside a small model, where one is made first.

    Args:
        spec: the shape of the full-size model.
        recipe: with every choice made.
        plan: of the run.
        steps: of the run.
    """
    one = sum(line.bytes for line in plan.ledger if line.what in _CHECKPOINTED)
    saved = -(-steps // save_interval(recipe, steps))
    kept = min(recipe.keep_checkpoints, saved)
    small = _small_bytes(spec, recipe) if plan.fit == "prune" else 0
    loram = small and recipe.prune_method == "loram"
    result = small if small and not loram else _result_bytes(spec, recipe)
    return (small if loram else 0) + one * kept + max(one if saved > kept else 0, result)


def _result_bytes(spec: ModelSpec, recipe: Recipe) -> int:
    """The adapter in float32, or the model, of 16 bits at least."""
    return 2 * spec.params if recipe.method in CHANGES_MODEL else 4 * elements(adapter_factors(spec, recipe))


def _small_bytes(spec: ModelSpec, recipe: Recipe) -> int:
    """A small model that the run makes: linears in NF4 or in 16 bits, the rest in 16."""
    if recipe.small_model or recipe.weights:
        return 0
    small = small_spec(spec, recipe)
    linears = nf4_bytes(small.linear_params) if recipe.quant == "nf4" else 2 * small.linear_params
    return linears + 2 * (small.params - small.linear_params)
