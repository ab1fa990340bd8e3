"""What a plan offers besides itself: the other ways to fit, and changes of what the recipe fixes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from effitrain.core.budget import MemoryBudget
from effitrain.core.choices import SAMPLES_PER_STEP, TILE_TOKENS, sequence_length
from effitrain.core.names import flag_of
from effitrain.core.recipe import Recipe
from effitrain.core.spec import ModelSpec
from effitrain.core.units import format_bytes
from effitrain.core.ways import Way, ways

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


def other_ways(spec: ModelSpec, recipe: Recipe, budget: MemoryBudget, chosen: Way) -> list[Alternative]:
    """The other ways: resident, streamed, and pruned at each ratio of the table, streamed too where it must."""
    found: dict[tuple[str, float | None], Way] = {}
    anew = recipe.changed(fit="auto", prune_ratio=None, resident_layers=None, small_model=None)
    for way in ways(spec, anew, budget, chosen.work):
        known = found.setdefault((way.fit, way.prune_ratio), way)
        if way.fits and not known.fits:
            found[way.fit, way.prune_ratio] = way
    return [_offer(way) for key, way in found.items() if key != (chosen.fit, chosen.prune_ratio)]


def leaner(way: Way) -> list[Alternative]:
    """Where nothing fits: single changes of what is fixed, else the first that suffice together; a shorter length."""
    changes = list(_changes(way))
    offers = [_changed(way, change) for change in changes]
    together: dict[str, Any] = {}
    for change in changes:
        if any(offer.fits for offer in offers):
            break
        together |= change
        if len(together) > len(change):
            offers.append(_changed(way, together))
    for base in ({}, together):
        if length := _longest(way, way.recipe.changed(**base)):
            offers.append(_changed(way, {**base, "max_seq_len": length}))
            break
    return [offer for offer in offers if offer.peak_bytes < way.best.peak]


def _offer(way: Way) -> Alternative:
    """A way as it is, by the flags it takes."""
    flags = f"--fit {way.fit}" + (f" --prune-ratio {way.prune_ratio:g}" if way.prune_ratio is not None else "")
    return _alternative(way, flags if way.fits else _shortage(way))


def _shortage(way: Way) -> str:
    device, host = way.shortage
    parts = [(device, "the device", way.budget.gpu_bytes), (host, "the host", way.budget.host_bytes)]
    short = [f"{format_bytes(size)} short of {format_bytes(have)} on {where}" for size, where, have in parts if size]
    return f"At {way.best.settings.tokens} tokens it is {' and '.join(short)}."


def _changed(way: Way, change: Mapping[str, Any]) -> Alternative:
    flags = " ".join(f"{flag_of(field)} {value}" for field, value in change.items())
    return _alternative(replace(way, recipe=way.recipe.changed(**change)), flags)


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
    if recipe.batch_size and recipe.batch_size > 1:
        samples = recipe.batch_size * recipe.grad_accum if recipe.grad_accum else SAMPLES_PER_STEP
        yield {"batch_size": 1, "grad_accum": samples} if training else {"batch_size": 1}
    if training and recipe.optimizer == "adamw":
        yield {"optimizer": "adamw8bit"}
    if recipe.dtype == "fp32" and way.budget.device == "cuda":
        yield {"dtype": "bf16"}
    if recipe.quant == "none" and recipe.method != "full":
        yield {"quant": "nf4"}


def _longest(way: Way, recipe: Recipe) -> int | None:
    """The longest sequence below the recipe's, in steps of 64 tokens, that fits with the leanest open settings."""
    low, high = 0, (sequence_length(way.spec, recipe) - 1) // LENGTH_STEP
    while low < high:
        middle = (low + high + 1) // 2
        shorter = replace(way, recipe=recipe.changed(max_seq_len=middle * LENGTH_STEP))
        low, high = (middle, high) if shorter.fits else (low, middle - 1)
    return low * LENGTH_STEP or None
