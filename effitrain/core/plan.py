"""The plan: what fits the budget and how, as a value made from integers alone."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from effitrain.core.budget import MemoryBudget
from effitrain.core.choices import (
    CPU_MICRO_BATCH_TOKENS,
    SAMPLES_PER_STEP,
    Choice,
    fastest,
    leanest,
    list_choices,
    sequence_length,
)
from effitrain.core.errors import BudgetError, InputError
from effitrain.core.ledger import LedgerLine, Settings
from effitrain.core.memory import adapted
from effitrain.core.recipe import Recipe
from effitrain.core.spec import ModelSpec
from effitrain.core.units import format_bytes

# Shorter sequences are offered in multiples of this.
LENGTH_STEP = 64


@dataclass(frozen=True)
class ModelFigures:
    """The model in the plan; ``linear_params`` counts the matrices of the decoder linears."""

    name: str
    params: int
    linear_params: int
    layers: int
    hidden: int
    vocab: int


@dataclass(frozen=True)
class Alternative:
    """Another way to fit. ``why`` is the flags it takes, or why not; figures this version cannot tell are None."""

    fit: str
    prune_ratio: float | None
    fits: bool
    peak_bytes: int | None
    host_peak_bytes: int | None
    tokens_per_second_estimate: float | None
    why: str


@dataclass(frozen=True)
class Plan:
    """What a run will do and what it takes, in bytes; the ledger's ``gpu`` lines sum to ``peak_bytes``.

    ``reasons`` explain the choices; when nothing fits the first one says what is short.
    """

    fits: bool
    fit: str
    budget_bytes: int
    peak_bytes: int
    host_peak_bytes: int
    overhead_bytes: int
    resident_layers: int
    prune_ratio: float | None
    micro_batch_tokens: int
    model: ModelFigures
    ledger: tuple[LedgerLine, ...]
    alternatives: tuple[Alternative, ...]
    reasons: tuple[str, ...]
    proof: Mapping[str, float] | None
    settings: Settings

    def to_json(self) -> dict[str, Any]:
        """The content of plan.json."""
        fields = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}


def make_plan(spec: ModelSpec, recipe: Recipe, budget: MemoryBudget) -> Plan:
    """The fastest settings that fit the budget; what the recipe fixes stays. Where nothing fits, the leanest.

    Raises:
        InputError: the recipe adapts a linear that the model does not have.
    """
    _check_targets(spec, recipe)
    choices = list_choices(spec, recipe, budget)
    choice = fastest(choices, recipe, budget)
    return Plan(
        fits=choice.fits(budget),
        fit="resident",
        budget_bytes=budget.gpu_bytes,
        peak_bytes=choice.peak,
        host_peak_bytes=choice.host_peak,
        overhead_bytes=budget.overhead_bytes,
        resident_layers=spec.num_layers,
        prune_ratio=None,
        micro_batch_tokens=choice.settings.tokens,
        model=ModelFigures(spec.name, spec.params, spec.linear_params, spec.num_layers, spec.hidden, spec.vocab),
        ledger=choice.ledger,
        alternatives=(*_leaner(spec, recipe, budget, choice), *_NOT_YET),
        reasons=(
            *_shortfalls(choice, budget),
            *_notices(spec, choice, budget),
            *_explain(choice, choices, recipe, budget),
        ),
        proof=None,
        settings=choice.settings,
    )


def resolve(recipe: Recipe, plan: Plan) -> Recipe:
    """The recipe with every training field that was left to the plan filled in."""
    settings = dataclasses.asdict(plan.settings)
    offload = "on" if settings.pop("offload") else "off"
    return recipe.changed(**settings, offload_activations=offload)


def refusal(plan: Plan) -> BudgetError:
    """The error for a plan that does not fit: what is short, and what would fit."""
    ways = [f"{way.why} ({format_bytes(way.peak_bytes)})" for way in plan.alternatives if way.fits and way.peak_bytes]
    advice = f"Try {', or '.join(ways)}." if ways else "Nothing resident fits: it takes more memory or a smaller model."
    return BudgetError(plan.reasons[0], next_step=advice, plan=plan)


def _check_targets(spec: ModelSpec, recipe: Recipe) -> None:
    linears = [*spec.layers[0].linears, spec.head]
    known = {name for linear in linears for name in (linear.name, linear.leaf)}
    unknown = [name for name in recipe.lora_targets or () if name not in known]
    if unknown or not any(adapted(linear, recipe) for linear in linears):
        fact = f"{spec.name} has no linear named {', '.join(unknown)}." if unknown else "No linear is adapted."
        raise InputError(fact, next_step=f"--lora-targets takes any of {', '.join(linear.leaf for linear in linears)}.")


def _shortfalls(choice: Choice, budget: MemoryBudget) -> Iterator[str]:
    if (short := choice.peak - budget.gpu_bytes) > 0:
        need, have = format_bytes(choice.peak), format_bytes(budget.gpu_bytes)
        at = f"{choice.settings.tokens} tokens"
        yield f"The model needs {need} at {at} and the budget is {have}: {format_bytes(short)} short."
    if (short := choice.host_peak - budget.host_bytes) > 0:
        need, have = format_bytes(choice.host_peak), format_bytes(budget.host_bytes)
        yield f"The host needs {need} and its budget is {have}: {format_bytes(short)} short."


def _notices(spec: ModelSpec, choice: Choice, budget: MemoryBudget) -> Iterator[str]:
    if budget.notice:
        yield budget.notice
    if choice.settings.max_seq_len > spec.max_positions:
        length = choice.settings.max_seq_len
        yield f"Sequences of {length} tokens are longer than the {spec.max_positions} positions the model was made for."


def _explain(choice: Choice, choices: list[Choice], recipe: Recipe, budget: MemoryBudget) -> Iterator[str]:
    """Why the open settings came out as they did; nothing to say where none of them fits."""
    settings = choice.settings
    if choice.peak > budget.gpu_bytes:
        return
    if recipe.batch_size is None:
        why = f"{settings.batch_size * settings.grad_accum} samples a step"
        if settings.batch_size < max(other.settings.batch_size for other in choices):
            why = f"the fastest that fits {format_bytes(budget.gpu_bytes)}"
        elif 2 * settings.batch_size <= SAMPLES_PER_STEP // (recipe.grad_accum or 1):
            why = f"a CPU gains no speed beyond {CPU_MICRO_BATCH_TOKENS} tokens"
        yield f"Micro-batches of {settings.batch_size} x {settings.max_seq_len} tokens: {why}."
    if recipe.recompute == "auto" and settings.recompute == "none":
        yield "No recomputation: the activations fit, and recomputing costs half as much compute again."
    elif recipe.recompute == "auto":
        kept = next(other for other in choices if other.settings == dataclasses.replace(settings, recompute="none"))
        yield f"Layers are recomputed in the backward pass: keeping every activation needs {format_bytes(kept.peak)}."


def _leaner(spec: ModelSpec, recipe: Recipe, budget: MemoryBudget, choice: Choice) -> list[Alternative]:
    """Where nothing fits: single changes of what is fixed, else the first that suffice together; a shorter length."""
    if choice.fits(budget):
        return []
    changes = list(_changes(recipe, budget.device))
    offers = [_alternative(spec, recipe, change, budget) for change in changes]
    together: dict[str, Any] = {}
    for change in changes:
        if any(offer.fits for offer in offers):
            break
        together |= change
        if len(together) > len(change):
            offers.append(_alternative(spec, recipe, together, budget))
    for base in ({}, together):
        if length := _longest(spec, recipe.changed(**base), budget):
            offers.append(_alternative(spec, recipe, {**base, "max_seq_len": length}, budget))
            break
    return [offer for offer in offers if offer.peak_bytes is not None and offer.peak_bytes < choice.peak]


def _changes(recipe: Recipe, device: str) -> Iterator[dict[str, Any]]:
    """Changes of one fixed field each that save memory, those that leave the result as it is first."""
    if recipe.recompute == "none":
        yield {"recompute": "layer"}
    if recipe.batch_size and recipe.batch_size > 1:
        samples = recipe.batch_size * recipe.grad_accum if recipe.grad_accum else SAMPLES_PER_STEP
        yield {"batch_size": 1, "grad_accum": samples}
    if recipe.optimizer == "adamw":
        yield {"optimizer": "adamw8bit"}
    if recipe.dtype == "fp32" and device == "cuda":
        yield {"dtype": "bf16"}
    if recipe.quant == "none":
        yield {"quant": "nf4"}


def _longest(spec: ModelSpec, recipe: Recipe, budget: MemoryBudget) -> int | None:
    """The longest sequence below the recipe's, in steps of 64 tokens, that fits with the leanest open settings."""
    low, high = 0, (sequence_length(spec, recipe) - 1) // LENGTH_STEP
    while low < high:
        middle = (low + high + 1) // 2
        choices = list_choices(spec, recipe.changed(max_seq_len=middle * LENGTH_STEP), budget)
        low, high = (middle, high) if leanest(choices).fits(budget) else (low, middle - 1)
    return low * LENGTH_STEP or None


def _alternative(spec: ModelSpec, recipe: Recipe, change: Mapping[str, Any], budget: MemoryBudget) -> Alternative:
    choice = leanest(list_choices(spec, recipe.changed(**change), budget))
    flags = " ".join(f"--{field.replace('_', '-')} {value}" for field, value in change.items())
    return Alternative("resident", None, choice.fits(budget), choice.peak, choice.host_peak, None, flags)


_NOT_YET = (
    Alternative("stream", None, False, None, None, None, "Layer streaming is not in this version yet."),
    Alternative("prune", None, False, None, None, None, "Pruning is not in this version yet."),
)
