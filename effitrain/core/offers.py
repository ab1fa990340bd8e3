"""What a plan offers besides itself: the other ways to fit, and changes of what the recipe fixes."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from effitrain.core.budget import MemoryBudget, with_margin
from effitrain.core.choices import SAMPLES_PER_STEP, TILE_TOKENS, sequence_length
from effitrain.core.errors import InputError
from effitrain.core.ledger import Work
from effitrain.core.methods import METHODS, SAMPLED
from effitrain.core.names import flag_of
from effitrain.core.recipe import Recipe
from effitrain.core.spec import ModelSpec
from effitrain.core.units import format_bytes
from effitrain.core.ways import PRUNE_RATIOS, Way, choose, prunable

# Shorter sequences are offered in multiples of this.
LENGTH_STEP = 64


@dataclass(frozen=True)
class Alternative:
    """Another way to fit. ``why`` is the flags it takes, or why it does not fit."""

    fit: str
    prune_ratio: float | None
    fits: bool
    peak_bytes: int
    host_peak_bytes: int
    tokens_per_second_estimate: float
    why: str


@dataclass(frozen=True)
class Asked:
    """What a plan was asked for."""

    spec: ModelSpec
    recipe: Recipe
    budget: MemoryBudget
    work: Work

    def changed(self, change: Mapping[str, Any]) -> "Asked":
        """The same with fields of the recipe replaced.

        Raises:
            InputError: the recipe contradicts itself then.
        """
        return replace(self, recipe=self.recipe.changed(**change))

    @property
    def way(self) -> Way:
        """What the plan takes."""
        return choose(self.spec, self.recipe, self.budget, self.work)


def other_ways(asked: Asked, chosen: Way) -> list[Alternative]:
    """The other ways: resident, streamed, and pruned at each ratio of the table, as a plan with those flags is."""
    pruning = asked.recipe.fields_in("pruning")
    others: list[tuple[dict[str, Any], tuple[str, ...]]] = [
        ({"fit": "resident"}, ("resident_layers", "stream_order", *pruning)),
        ({"fit": "stream"}, ("resident_layers", "recompute", *pruning)),
    ]
    for ratio in PRUNE_RATIOS if prunable(asked.spec, asked.recipe) else ():
        anew = ("resident_layers", "small_model", "prune_method")
        others.append(({"fit": "prune", "prune_ratio": ratio}, anew))
    here = chosen.fit, chosen.prune_ratio
    offers = [_other(asked, *other) for other in others if (other[0]["fit"], other[0].get("prune_ratio")) != here]
    return [offer for offer in offers if offer]


def leaner(asked: Asked, chosen: Way) -> list[Alternative]:
    """Where nothing fits: single changes of what is fixed, else the first that suffice together; a shorter length."""
    tried = [(change, _changed(asked, change)) for change in _changes(chosen)]
    offers = [offer for _, found in tried for offer in found]
    together: dict[str, Any] = {}
    for change in [change for change, found in tried if found]:
        if any(offer.fits for offer in offers):
            break
        together |= change
        if len(together) > len(change):
            offers += _changed(asked, together)
    offers += _shorter(asked, {}) or _shorter(asked, together)
    if asked.recipe.fit == "auto" and offers and offers[-1].fit == "prune":  # and what needs no pruning
        offers += _shorter(asked, {"fit": "stream"})
    return [offer for offer in offers if offer.fits or offer.peak_bytes < chosen.best.peak]


def _other(asked: Asked, change: Mapping[str, Any], without: Iterable[str]) -> Alternative | None:
    """Another way by the flags it takes, and those of ``without`` that were given and must go; None where what else was
    asked for forbids it.
    """
    fields = type(asked.recipe).model_fields
    left = {name: fields[name].default for name in without if name not in change}
    gone = [name for name, default in left.items() if getattr(asked.recipe, name) != default]
    way = _way(asked, {**left, **change})
    words = _flags(change) + (f" without {' '.join(map(flag_of, gone))}" if gone else "")
    return _alternative(way, words if way.fits else _shortage(way)) if way else None


def _shortage(way: Way) -> str:
    device, host = way.shortage
    parts = [(device, way.budget.where, way.budget.gpu_bytes), (host, "on the host", way.budget.host_bytes)]
    short = [f"{format_bytes(size)} short of {format_bytes(have)} {where}" for size, where, have in parts if size]
    return f"At {way.best.settings.tokens} tokens it is {' and '.join(short)}."


def _changed(asked: Asked, change: Mapping[str, Any]) -> list[Alternative]:
    """The plan with ``change``; none where what else was asked for forbids it."""
    way = _way(asked, change)
    return [_alternative(way, _flags(change))] if way else []


def _way(asked: Asked, change: Mapping[str, Any]) -> Way | None:
    try:
        return asked.changed(change).way
    except InputError:
        return None


def _shorter(asked: Asked, change: Mapping[str, Any]) -> list[Alternative]:
    """The plan of the longest sequences that fit with ``change``, if any do."""
    with suppress(InputError):
        if length := _longest(asked.changed(change)):
            return _changed(asked, {**change, "max_seq_len": length})
    return []


def _flags(change: Mapping[str, Any]) -> str:
    return " ".join(f"{flag_of(field)} {value}" for field, value in change.items())


def _alternative(way: Way, why: str) -> Alternative:
    best = way.best
    speed = round(best.tokens_per_second, 1)
    return Alternative(way.fit, way.prune_ratio, way.fits, best.peak, best.host_peak, speed, why)


def _changes(way: Way) -> Iterator[dict[str, Any]]:
    """Changes of one fixed field each that save memory, those that leave the result as it is first."""
    recipe, training = way.recipe, way.work == "train"
    if training and recipe.recompute in ("none", "mlp"):
        yield {"recompute": "layer"}
    if training and recipe.offload_activations == "off" and recipe.recompute in ("auto", "layer"):
        yield {"offload_activations": "on"}
    if recipe.mlp_tiles == 1 and not recipe.lora_dropout and way.best.settings.tokens > TILE_TOKENS:
        yield {"mlp_tiles": -(-way.best.settings.tokens // TILE_TOKENS)}
    if recipe.resident_layers:
        yield {"resident_layers": "auto"}
    if recipe.batch_size and recipe.batch_size > 1:
        samples = recipe.batch_size * recipe.grad_accum if recipe.grad_accum else SAMPLES_PER_STEP
        yield {"batch_size": 1, "grad_accum": samples} if training else {"batch_size": 1}
    if training and recipe.optimizer == "adamw":
        yield {"optimizer": "adamw8bit"}
    if recipe.dtype == "fp32" and way.budget.device == "cuda":
        yield {"dtype": "bf16"}
    if recipe.quant == "none" and recipe.method != "full":
        yield {"quant": "nf4"}
    if recipe.method in SAMPLED and recipe.lisa_layers > 1:
        yield {"lisa_layers": 1}
    if training and recipe.method in METHODS:
        yield {"method": "lora"} | ({"quant": "nf4"} if recipe.quant == "none" else {})


def _longest(asked: Asked) -> int | None:
    """The longest sequence below the recipe's, in steps of 64 tokens, that fits any way, and does so when less is free
    by the time it is tried.
    """
    recipe, budget = asked.recipe, with_margin(asked.budget, asked.recipe)
    smallest = {"batch_size": recipe.batch_size or 1}  # nothing takes less, and the search has a tenth of the choices
    if recipe.stream_order != "layer":
        smallest["grad_accum"] = recipe.grad_accum or 1

    def fits(steps: int) -> bool:
        shorter = recipe.changed(**smallest, max_seq_len=steps * LENGTH_STEP)
        return replace(asked, recipe=shorter, budget=budget).way.fits

    low = (recipe.s2_group or 0) // LENGTH_STEP + 1  # a group is a part of a sequence
    high = (sequence_length(asked.spec, recipe) - 1) // LENGTH_STEP
    if low > high or not fits(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low * LENGTH_STEP
