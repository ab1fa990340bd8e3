"""What a run has yet to write to its output folder, in bytes, from integers alone."""

from effitrain.core.cut import small_spec
from effitrain.core.memory import adapter_factors, nf4_bytes
from effitrain.core.methods import CHANGES_MODEL
from effitrain.core.plan import Plan
from effitrain.core.recipe import Recipe
from effitrain.core.spec import ModelSpec
from effitrain.core.weights import elements

# Lines of the ledger that a checkpoint holds as they are, at the end of a run of LISA those of layers that took turns.
# Moments of the embedding, which come with the tokens that are met, are left out.
_CHECKPOINTED = (
    "adapter weights", "trained weights", "trained layers", "embedding, trained", "optimizer states",
    "states of layers that left",
)  # fmt: skip
# Alignment by training, bytes a weight: the small model in 16 bits, and two checkpoints of master weights and moments.
_ALIGNING = 2 + 2 * 12


def save_interval(recipe: Recipe, steps: int) -> int:
    """Steps from one checkpoint to the next: the recipe's, else a tenth of the run."""
    return recipe.save_every or max(1, steps // 10)


def bytes_to_come(
    spec: ModelSpec, recipe: Recipe, plan: Plan, steps: int, done: int = 0, held: int = 0, small_is_there: bool = False
) -> int:
    """The most that the output folder will hold beyond what it holds now.

    A new checkpoint is written before an old one goes. What is saved in the end comes beside the checkpoints.

    Args:
        spec: the shape of the full-size model.
        recipe: with every choice made.
        plan: of the run.
        steps: of the run.
        done: of them.
        held: checkpoints that are there.
        small_is_there: whether the small model, where the run makes one, was made before.
    """
    one = sum(line.bytes for line in plan.ledger if line.what in _CHECKPOINTED)
    every = save_interval(recipe, steps)
    left = -(-steps // every) - done // every if done < steps else 0
    most = max(1, min(held + left - 1, recipe.keep_checkpoints) + 1 - held) if left else 0
    at_last = min(held + left, recipe.keep_checkpoints) - held if left else 0
    if plan.fit != "prune":
        return max(one * most, one * at_last + _result_bytes(spec, recipe))
    small = small_spec(spec, recipe)
    if recipe.prune_method == "loraprune":
        sizes = 2 * small.params + (_small_bytes(small, "nf4") if recipe.quant == "nf4" else 0)
        return max(one * most, one * at_last + sizes)
    training = max(one * most, one * at_last + _result_bytes(small, recipe) + _result_bytes(spec, recipe))
    if small_is_there or recipe.small_model or recipe.weights:
        return training
    return max(_ALIGNING * small.params if recipe.align == "train" else 0, _small_bytes(small, recipe.quant) + training)


def _result_bytes(spec: ModelSpec, recipe: Recipe) -> int:
    """The adapter in float32, with the embedding where it is trained, or the model, of 16 bits at least."""
    if recipe.method in CHANGES_MODEL:
        return 2 * spec.params
    return 4 * (elements(adapter_factors(spec, recipe)) + spec.embedding_params * recipe.train_embeddings)


def _small_bytes(small: ModelSpec, quant: str) -> int:
    """A small model's files: linears in NF4 or in 16 bits, the rest in 16."""
    linears = nf4_bytes(small.linear_params) if quant == "nf4" else 2 * small.linear_params
    return linears + 2 * (small.params - small.linear_params)
