"""The ways to make a model fit, from the exact and fast to the approximate, each with the settings it leaves open."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from effitrain.core.budget import MemoryBudget
from effitrain.core.choices import Choice, Weights, best, group_of, list_choices, sequence_length
from effitrain.core.cut import ratio_of, small_spec
from effitrain.core.errors import InputError
from effitrain.core.ledger import Work
from effitrain.core.methods import METHODS
from effitrain.core.recipe import Recipe
from effitrain.core.spec import ModelSpec
from effitrain.core.stages import Stage, stages

# Ratios that are tried: those of LoRAM (Zhang et al. 2025, table 4), and a half.
PRUNE_RATIOS = (0.5, 0.65, 0.75, 0.85, 0.95)


@dataclass(frozen=True)
class Way:
    """One way: the model as it is trained (pruned, or whole), and where its frozen weights live."""

    fit: Literal["resident", "stream", "prune"]
    weights: Weights
    spec: ModelSpec
    recipe: Recipe
    budget: MemoryBudget
    prune_ratio: float | None = None
    whole: ModelSpec | None = None  # what is pruned first
    work: Work = "train"

    @cached_property
    def choices(self) -> list[Choice]:
        """Every combination of settings that the recipe leaves open."""
        return list_choices(self.spec, self.recipe, self.budget, self.weights, self.work)

    @cached_property
    def best(self) -> Choice:
        """The fastest of them that fits, else the leanest."""
        return best(self.choices, self.budget)

    @property
    def fits(self) -> bool:
        """Whether any of them does, and the stages before it."""
        return self.shortage == (0, 0)

    @cached_property
    def stages(self) -> list[Stage]:
        """What is done to the model before it is trained."""
        return stages(self.whole, self.spec, self.recipe, self.budget) if self.whole else []

    @property
    def shortage(self) -> tuple[int, int]:
        """Bytes that are missing on the device and on the host."""
        device = max([self.best.peak, *(stage.device for stage in self.stages)]) - self.budget.gpu_bytes
        host = max([self.best.host_peak, *(stage.host for stage in self.stages)]) - self.budget.host_bytes
        return max(0, device), max(0, host)


def choose(spec: ModelSpec, recipe: Recipe, budget: MemoryBudget, work: Work = "train") -> Way:
    """The first way that fits; where none does, the one that is least short.

    Raises:
        InputError: as ``ways`` does.
    """
    possible = ways(spec, recipe, budget, work)
    return next((way for way in possible if way.fits), None) or min(possible, key=lambda way: sum(way.shortage))


def prunable(spec: ModelSpec, recipe: Recipe) -> bool:
    """Whether a plan prunes by itself: not what was pruned already, nor two layers, which are both exempt."""
    return len(spec.shapes) == 1 and spec.num_layers > 2 and recipe.method not in METHODS


def ways(spec: ModelSpec, recipe: Recipe, budget: MemoryBudget, work: Work = "train") -> list[Way]:
    """The ways that ``recipe`` allows, best first: resident, streamed, pruned, and pruned and streamed.

    ``--prefer fast`` puts pruning before streaming. What is no training is done with the whole model.

    Raises:
        InputError: the recipe's ratio or exempt layers leave nothing to prune, the model is pruned already, or shifted
            groups hold whole samples.
    """
    _check_layers(spec, recipe)
    if work != "train":
        return _whole(spec, recipe, budget, work)
    _check_group(recipe, sequence_length(spec, recipe))
    if recipe.prune_method == "loraprune":
        small_spec(spec, recipe)
        return [Way("prune", "resident", spec, recipe, budget, recipe.prune_ratio)]  # the whole model, masked
    if recipe.method == "full":
        return [Way("resident", "resident", spec, recipe, budget)]
    can_stream = recipe.recompute in ("auto", "layer")
    resident = [Way("resident", "resident", spec, recipe, budget)] if recipe.resident_layers is None else []
    stream = [Way("stream", "streamed", spec, recipe, budget)] if can_stream else []
    prune: list[Way] = []
    if recipe.asks_to_prune and len(spec.shapes) > 1:
        raise InputError(
            f"{spec.name} has layers of several widths: it is pruned already, and is not pruned again.",
            next_step="Train on it as it is, or prune the full-size model by more.",
        )
    if recipe.asks_to_prune or (recipe.fit == "auto" and prunable(spec, recipe)):
        cut = _cut(spec, recipe)
        kept: tuple[Weights, ...] = ("resident", "streamed") if can_stream else ("resident",)
        kept = kept if recipe.resident_layers is None else tuple(way for way in kept if way == "streamed")
        prune = [Way("prune", weights, cut[ratio], recipe, budget, ratio, spec) for weights in kept for ratio in cut]
    if recipe.fit != "auto":
        return {"resident": resident, "stream": stream, "prune": prune}[recipe.fit]
    if recipe.asks_to_prune:
        return prune
    return [*resident, *prune, *stream] if recipe.prefer == "fast" else [*resident, *stream, *prune]


def _cut(spec: ModelSpec, recipe: Recipe) -> dict[float, ModelSpec]:
    """The small models that come into question, by ratio.

    Raises:
        InputError: one is there already, and was cut by another ratio than the recipe's.
    """
    if not recipe.small_model:
        ratios = PRUNE_RATIOS if recipe.prune_ratio is None else (recipe.prune_ratio,)
        return {ratio: small_spec(spec, recipe.changed(prune_ratio=ratio)) for ratio in ratios}
    small = small_spec(spec, recipe)
    ratio = ratio_of(spec, small, recipe)
    if recipe.prune_ratio not in (None, ratio):
        raise InputError(
            f"The small model {recipe.small_model} was cut by {ratio:g}, and --prune-ratio is {recipe.prune_ratio:g}.",
            next_step="Leave --prune-ratio out to train on it, or --small-model to prune anew.",
        )
    return {ratio: small}


def _whole(spec: ModelSpec, recipe: Recipe, budget: MemoryBudget, work: Work) -> list[Way]:
    if recipe.fit == "prune":
        raise InputError(
            "--fit prune is for training: a pruned model answers differently.",
            next_step="Use --fit auto, or name with --model a folder that `effitrain prune` wrote.",
        )
    resident = [Way("resident", "resident", spec, recipe, budget, work=work)] if recipe.resident_layers is None else []
    stream = [Way("stream", "streamed", spec, recipe, budget, work=work)]
    return {"auto": [*resident, *stream], "resident": resident, "stream": stream}[recipe.fit]


def _check_layers(spec: ModelSpec, recipe: Recipe) -> None:
    layers, lean = recipe.resident_layers, recipe.recompute in ("auto", "layer")
    if layers is None:
        return
    if layers >= spec.num_layers:
        raise InputError(
            f"--resident-layers {layers}: {spec.name} has {spec.num_layers} layers, and some must be left to stream.",
            next_step=f"Name at most {spec.num_layers - 1}, or --fit resident.",
        )
    if not lean or recipe.prune_method == "loraprune":
        other = "--prune-method loraprune" if lean else f"--recompute {recipe.recompute}"
        raise InputError(
            f"--resident-layers is for models that stream, and {other} keeps all layers on the device.",
            next_step="Leave one of the two out.",
        )


def _check_group(recipe: Recipe, length: int) -> None:
    group = group_of(recipe, length)
    if group is not None and group >= length:
        raise InputError(
            f"--s2-group {group} holds whole samples of --max-seq-len {length}: attention would be full.",
            next_step="Leave --s2-group out for a quarter of the length, or use --attention full.",
        )
