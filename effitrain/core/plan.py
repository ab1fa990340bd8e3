"""The plan: what fits the budget and how, as a value made from integers alone."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from effitrain.core.budget import MemoryBudget
from effitrain.core.cards import TYPICAL, rates_of
from effitrain.core.choices import CPU_MICRO_BATCH_TOKENS, SAMPLES_PER_STEP, Choice
from effitrain.core.cut import default_exempt, small_spec
from effitrain.core.errors import BudgetError, InputError
from effitrain.core.ledger import DISK, LedgerLine, Settings, Work, gpu_bytes, host_bytes
from effitrain.core.memory import adapted, make_ledger
from effitrain.core.methods import SAMPLED
from effitrain.core.names import flag_of
from effitrain.core.offers import Alternative, Asked, leaner, other_ways
from effitrain.core.recipe import Recipe
from effitrain.core.rules import given
from effitrain.core.spec import ModelSpec
from effitrain.core.speed import step_time, tokens_to_hide
from effitrain.core.units import counted, format_bytes
from effitrain.core.ways import Way
from effitrain.core.weights import busy_layers, check_layers, trains_tables


@dataclass(frozen=True)
class ModelFigures:
    """The full-size model in the plan; ``linear_params`` counts the matrices of the decoder linears."""

    name: str
    params: int
    linear_params: int
    layers: int
    hidden: int
    vocab: int


@dataclass(frozen=True)
class Plan:
    """What a run will do and what it takes, in bytes; the ledger's ``gpu`` lines sum to ``peak_bytes``.

    ``reasons`` explain the choices; when nothing fits the first one says what is short. ``tokens_per_second_estimate``
    is from data sheets.
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
    proof: Mapping[str, Any] | None
    settings: Settings
    tokens_per_second_estimate: float

    def to_json(self) -> dict[str, Any]:
        """The content of plan.json."""
        fields = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}


def make_plan(spec: ModelSpec, recipe: Recipe, budget: MemoryBudget, work: Work = "train") -> Plan:
    """The first way that fits, from the exact and fast to the approximate; in it the fastest settings.

    What the recipe fixes stays. Where nothing fits, the leanest settings of the way that is least short. What is no
    training takes forward passes alone, and the adapter that ``recipe`` names is there to be used.

    Raises:
        InputError: the recipe adapts a linear that the model does not have, prunes what it cannot, shifts groups that
            hold whole samples, or trains more layers at a time than there are.
    """
    if work == "train":
        _check_targets(spec, recipe)
        check_layers(spec, recipe)
    asked = Asked(spec, recipe, budget, work)
    way = asked.way
    choice = way.best
    return Plan(
        fits=way.fits,
        fit=way.fit,
        budget_bytes=budget.gpu_bytes,
        peak_bytes=choice.peak,
        host_peak_bytes=choice.host_peak,
        overhead_bytes=budget.overhead_bytes,
        resident_layers=spec.num_layers - choice.settings.streamed,
        prune_ratio=way.prune_ratio,
        micro_batch_tokens=choice.settings.tokens,
        model=ModelFigures(spec.name, spec.params, spec.linear_params, spec.num_layers, spec.hidden, spec.vocab),
        ledger=choice.ledger,
        alternatives=(*(() if way.fits else leaner(asked, way)), *other_ways(asked, way)),
        reasons=(
            *_shortfalls(choice, budget),
            *_short_stages(way),
            *_notices(spec, choice, budget),
            *(_explain(way, choice, budget) if way.fits and work == "train" else ()),
        ),
        proof=None,
        settings=choice.settings,
        tokens_per_second_estimate=round(choice.tokens_per_second, 1),
    )


def for_tokens(plan: Plan, spec: ModelSpec, recipe: Recipe, budget: MemoryBudget, tokens: int, trained: int) -> Plan:
    """``plan`` with the peaks and the ledger of a micro-batch of ``tokens``, fewer than it has room for.

    Args:
        plan: made for the longest micro-batch possible.
        spec: the shape of the model that is trained.
        recipe: with every choice made.
        budget: of the plan.
        tokens: of the longest micro-batch of the data.
        trained: the most trained tokens of any micro-batch of the data.
    """
    tiles = -(-tokens // plan.settings.tile)
    settings = dataclasses.replace(plan.settings, batch_size=1, max_seq_len=tokens, mlp_tiles=tiles)
    ledger = make_ledger(spec, recipe, settings, budget, trained)
    return dataclasses.replace(
        plan, ledger=ledger, peak_bytes=gpu_bytes(ledger), host_peak_bytes=host_bytes(ledger), micro_batch_tokens=tokens
    )


def resolve(recipe: Recipe, plan: Plan) -> Recipe:
    """The recipe with every field that was left to the plan filled in."""
    settings = dataclasses.asdict(plan.settings)
    streamed, at_once = settings.pop("streamed"), settings.pop("at_once")
    del settings["on_disk"], settings["work"]
    order = recipe.stream_order
    if order == "auto":
        order = "layer" if at_once > 1 else "micro-batch"
    left = {name: type(recipe).model_fields[name].default for name in _unread(recipe, plan.fit)}
    fields = {
        **left,
        "stream_order": order if streamed else "auto",
        "fit": plan.fit,
        "offload_activations": "on" if settings.pop("offload") else "off",
        "resident_layers": plan.resident_layers if streamed else recipe.resident_layers,
        "prune_ratio": plan.prune_ratio if plan.fit == "prune" else recipe.prune_ratio,
    }
    return recipe.changed(**settings, **fields)


def _unread(recipe: Recipe, fit: str) -> list[str]:
    """Choices of pruning that are given, and that nothing reads where the plan does not prune."""
    return [] if fit == "prune" else given(recipe, recipe.fields_in("pruning"))


def refusal(plan: Plan) -> BudgetError:
    """The error for a plan that does not fit: what is short, and what would fit."""
    fitting = [way for way in plan.alternatives if way.fits]
    pruned = [way for way in fitting if way.why.startswith("--fit prune")]
    ways = [f"{way.why} ({_what_it_takes(way)})" for way in fitting if way not in pruned[1:]]
    advice = f"Try {', or '.join(ways)}." if ways else "Nothing fits: it takes more memory or a smaller model."
    return BudgetError(plan.reasons[0], next_step=advice, plan=plan)


def _what_it_takes(way: Alternative) -> str:
    """How a way fits, where its flags do not say so, and its bytes."""
    how = {"resident": "", "stream": "streamed, ", "prune": f"pruned by {way.prune_ratio or 0:g}, "}[way.fit]
    sizes = f"{format_bytes(way.peak_bytes)}, {format_bytes(way.host_peak_bytes)} of host memory"
    return sizes if "--fit" in way.why else f"{how}{sizes}"


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


def _short_stages(way: Way) -> Iterator[str]:
    for stage in way.stages:
        for size, have, where in (
            (stage.device, way.budget.gpu_bytes, way.budget.where),
            (stage.host, way.budget.host_bytes, "of host memory"),
        ):
            if size > have:
                yield (
                    f"{stage.what} before training needs {format_bytes(size)} {where} and the budget is"
                    f" {format_bytes(have)}: {format_bytes(size - have)} short. Less takes {stage.leaner}."
                )


def _notices(spec: ModelSpec, choice: Choice, budget: MemoryBudget) -> Iterator[str]:
    yield from budget.notices
    if budget.device == "cuda" and rates_of(budget.card) is None:
        yield f"Speed is estimated as on an {TYPICAL}: the card is not known."
    if past := past_length(spec, choice.settings.max_seq_len):
        yield past


def past_length(spec: ModelSpec, length: int) -> str | None:
    """What to say where sequences are longer than the model's positions."""
    if length <= spec.max_positions:
        return None
    return (
        f"Sequences of {length} tokens are longer than the {spec.max_positions} positions the model was made for, and"
        " what it makes of tokens beyond them is worth little: --rope-scaling and training make them usable."
    )


def _explain_turns(way: Way, choice: Choice) -> Iterator[str]:
    count, layers = busy_layers(choice.spec, way.recipe), choice.spec.num_layers
    tables = trains_tables(choice.spec, way.recipe)
    yield f"{count} of {layers} layers are trained at a time{', and embedding, head and last norm' * tables}."
    waiting = next((line for line in choice.ledger if line.what == "trained layers"), None)
    if waiting:
        yield f"Layers that were trained wait in host memory and stream: {waiting.formula}."


def _explain(way: Way, choice: Choice, budget: MemoryBudget) -> Iterator[str]:
    """Why the open settings came out as they did."""
    settings, recipe, have = choice.settings, way.recipe, format_bytes(budget.gpu_bytes)
    if settings.streamed:
        yield from _explain_streaming(way, choice, budget)
    if recipe.rope_scaling in ("linear", "ntk", "yarn") and recipe.rope_factor:
        yield (
            f"Positions are scaled ({recipe.rope_scaling}, {recipe.rope_factor:g} times the model's length), to"
            f" {way.spec.max_positions:,} of them."
        )
    if unread := _unread(recipe, way.fit):
        flags = " and ".join(f"{flag_of(name)} {getattr(recipe, name)}" for name in unread)
        yield f"Nothing is pruned, so nothing reads {flags}: --fit prune prunes."
    if settings.s2_group:
        yield f"Training attends within shifted groups of {settings.s2_group} tokens; evaluation attends in full."
    if recipe.method in SAMPLED:
        yield from _explain_turns(way, choice)
    if way.fit == "prune":
        yield from _explain_pruning(way)
    for stage in way.stages:
        sizes = f"{format_bytes(stage.device)} {budget.where} and {format_bytes(stage.host)} of host memory"
        yield f"{stage.what} before training takes up to {sizes}."
    if recipe.small_model:
        yield f"{recipe.small_model} is trained on as it is: it was pruned by {way.prune_ratio:g}."
    elif way.prune_ratio is not None and recipe.prune_ratio is None:
        yield f"Pruned by {way.prune_ratio:g}: the smallest ratio of the table that fits {have}."
    if recipe.batch_size is None:
        why = f"{counted(settings.batch_size * settings.grad_accum, 'sample')} a step"
        if settings.batch_size < max(other.settings.batch_size for other in way.choices):
            why = f"the fastest that fits {have}"
        elif 2 * settings.batch_size <= SAMPLES_PER_STEP // (recipe.grad_accum or 1):
            why = f"a CPU gains no speed beyond {CPU_MICRO_BATCH_TOKENS} tokens"
        yield f"Micro-batches of {settings.batch_size} x {settings.max_seq_len} tokens: {why}."
    if recipe.recompute == "auto" and not settings.streamed:
        yield from _explain_recomputation(way, choice, budget)
    if recipe.optimizer is None and settings.optimizer != "adamw":
        yield "The optimizer keeps 8-bit states: with 32-bit ones nothing fits."
    if recipe.mlp_tiles is None and settings.mlp_tiles > 1:
        yield f"Norms and MLPs take tiles of {settings.tile:,} tokens: all at once do not fit."
    if recipe.offload_activations == "auto" and settings.offload:
        yield "Layer inputs wait in host memory for the backward pass."


def _explain_pruning(way: Way) -> Iterator[str]:
    if way.whole:
        yield "It trains on a pruned model, an approximation: the report tells how much of the gain arrives."
        return
    yield "It prunes the model while it trains it, and ships the small one: the whole model is in memory until the end."
    if len(small_spec(way.spec, way.recipe).shapes) > 1:
        exempt = way.recipe.prune_exempt or default_exempt(way.spec.num_layers)
        yield (
            f"The first {exempt[0]} and the last {exempt[1]} layers stay whole, and stock transformers does not load"
            " layers of several widths: --prune-exempt 0,0 makes a model that it loads."
        )


def _explain_streaming(way: Way, choice: Choice, budget: MemoryBudget) -> Iterator[str]:
    settings = choice.settings
    time = step_time(choice.spec, way.recipe, settings, budget.rates)
    tokens = tokens_to_hide(choice.spec, way.recipe, settings, budget.rates)
    visit = "visits" if settings.streamed == 1 else "visit"
    yield f"{settings.streamed} of {choice.spec.num_layers} layers {visit} the device twice {_how_often(settings)}."
    together = "that pass a layer together" if settings.at_once > 1 else "a micro-batch"
    yield (
        f"{time.hidden_share:.0%} of the copying hides behind computation, all of it from about {tokens:,} tokens"
        f" {together}."
    )
    store = sum(line.bytes for line in choice.ledger if line.where == DISK)
    if way.fit == "stream" and not way.recipe.weights:
        yield f"The store that layers stream from takes {format_bytes(store)} of disk, and is made once."
    if settings.on_disk:
        rest, are = settings.streamed - settings.on_disk, "is" if settings.on_disk == 1 else "are"
        yield (
            f"{settings.on_disk} of the layers that stream {are} read from the disk in every pass, at"
            f" {budget.rates.disk / 1e9:g} GB/s if it gives that{f'; host memory holds {rest}' if rest else ''}."
        )


def _how_often(settings: Settings) -> str:
    if settings.at_once == 1:
        return "a micro-batch"
    if settings.passes == 1:
        return "a step: all its micro-batches pass a layer together"
    return (
        f"for every {settings.at_once} micro-batches, which pass a layer together: {settings.passes} groups a step, as"
        " many as memory for their layer inputs demands"
    )


def _explain_recomputation(way: Way, choice: Choice, budget: MemoryBudget) -> Iterator[str]:
    level = choice.settings.recompute
    if level == "none":
        yield "No recomputation: the activations fit, and recomputing costs half as much compute again."
        return
    plain = dataclasses.replace(
        choice.settings, recompute="none", offload=False, optimizer=way.recipe.optimizer or "adamw"
    )
    kept = next(
        (f": keeping every activation needs {format_bytes(o.peak)}" for o in way.choices if o.settings == plain), ""
    )
    what = {"mlp": "The MLPs are", "layer": "Layers are"}[level]
    yield f"{what} computed again in the backward pass{kept}."
