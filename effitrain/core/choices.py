"""The search: every combination of settings the recipe leaves open, their ledgers, and the fastest that fits."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from effitrain.core.budget import MemoryBudget
from effitrain.core.errors import InputError
from effitrain.core.forward import forward_ledger
from effitrain.core.ledger import LedgerLine, Settings, Work, gpu_bytes, host_bytes
from effitrain.core.memory import make_ledger
from effitrain.core.methods import WEIGHTS, default_lr
from effitrain.core.recipe import Recipe
from effitrain.core.spec import ModelSpec
from effitrain.core.speed import tokens_per_second
from effitrain.core.weights import trains_tables

SAMPLES_PER_STEP = 16
DEFAULT_MAX_SEQ_LEN = 2048
# Beyond this many tokens a CPU gains no speed from a larger micro-batch.
CPU_MICRO_BATCH_TOKENS = 4096
# Tokens of a tile: at so many, dequantising an MLP again for each adds 3 % to its products (100 TFLOP/s, 1 TB/s).
TILE_TOKENS = 4096
Dtype = Literal["bf16", "fp16", "fp32"]
Weights = Literal["resident", "streamed"]
Recompute = Literal["none", "mlp", "layer"]


@dataclass(frozen=True)
class Choice:
    """A way to run a step: the model's shape (that of the pruned one, where it is pruned), settings, ledger, speed."""

    spec: ModelSpec
    settings: Settings
    ledger: tuple[LedgerLine, ...]
    tokens_per_second: float

    @cached_property
    def peak(self) -> int:
        """Bytes on the device."""
        return gpu_bytes(self.ledger)

    @cached_property
    def host_peak(self) -> int:
        """Bytes on the host."""
        return host_bytes(self.ledger)

    def fits(self, budget: MemoryBudget) -> bool:
        """Whether both peaks are within the budget."""
        return self.peak <= budget.gpu_bytes and self.host_peak <= budget.host_bytes


def list_choices(
    spec: ModelSpec, recipe: Recipe, budget: MemoryBudget, weights: Weights = "resident", work: Work = "train"
) -> list[Choice]:
    """Every combination of what the recipe leaves open; one only when it fixes everything.

    Streamed choices hold as many layers on the device and in host memory as the budget allows, or as the recipe says.
    """
    choices = [_place(spec, recipe, settings, budget) for settings in _candidates(spec, recipe, budget, weights, work)]
    if not any(choice.fits(budget) for choice in choices):
        choices += [_place(spec, recipe, settings, budget) for settings in _tiled(choices, recipe)]
    if recipe.optimizer is None and work == "train" and recipe.lisa_state == "reset":
        lean = replace(leanest(choices, budget).settings, optimizer="adamw8bit")
        choices.append(_place(spec, recipe, lean, budget))
    return choices


def best(choices: list[Choice], budget: MemoryBudget) -> Choice:
    """The fastest choice that fits, of equals the largest micro-batch; the leanest when none does.

    8-bit optimizer states round, so they are taken only where fp32 states do not fit.
    """
    fitting = [choice for choice in choices if choice.fits(budget)]
    if not fitting:
        return leanest(choices, budget)
    exact = [choice for choice in fitting if choice.settings.optimizer == "adamw"] or fitting
    return max(exact, key=lambda choice: (choice.tokens_per_second, choice.settings.tokens))


def leanest(choices: list[Choice], budget: MemoryBudget) -> Choice:
    """The choice that is least short on the host, and of those the one of the smallest device peak."""
    return min(choices, key=lambda choice: (max(0, choice.host_peak - budget.host_bytes), choice.peak))


def sequence_length(spec: ModelSpec, recipe: Recipe) -> int:
    """Tokens of a sample: the recipe's, else the model's length, at most 2048."""
    return recipe.max_seq_len or min(spec.max_positions, DEFAULT_MAX_SEQ_LEN)


def compute_dtype(recipe: Recipe, budget: MemoryBudget) -> Dtype:
    """The recipe's, else the card's half precision, and fp32 on a CPU."""
    if recipe.dtype != "auto":
        return recipe.dtype
    return budget.half if budget.device == "cuda" else "fp32"


def group_of(recipe: Recipe, length: int) -> int | None:
    """Tokens of a group of shifted sparse attention: the recipe's, else a quarter of the length, even (LongLoRA)."""
    if recipe.attention != "s2":
        return None
    return recipe.s2_group or max(2, length // 8 * 2)


def _choice(spec: ModelSpec, recipe: Recipe, settings: Settings, budget: MemoryBudget) -> Choice:
    speed = tokens_per_second(spec, recipe, settings, budget.rates)
    return Choice(spec, settings, _ledger(spec, recipe, settings, budget), speed)


def _ledger(spec: ModelSpec, recipe: Recipe, settings: Settings, budget: MemoryBudget) -> tuple[LedgerLine, ...]:
    return (make_ledger if settings.work == "train" else forward_ledger)(spec, recipe, settings, budget)


def _place(spec: ModelSpec, recipe: Recipe, settings: Settings, budget: MemoryBudget) -> Choice:
    """A choice with its streamed layers placed: on the device and in host memory as many as fit, the rest on disk."""
    if not settings.streamed:
        return _choice(spec, recipe, settings, budget)
    layers = spec.num_layers

    def ledger(resident: int, on_disk: int) -> tuple[LedgerLine, ...]:
        placed = replace(settings, streamed=layers - resident, on_disk=on_disk)
        return _ledger(spec, recipe, placed, budget)

    if recipe.resident_layers is not None:
        resident = min(recipe.resident_layers, layers - 1)
    elif settings.optimizer != "adamw" and recipe.optimizer is None:
        resident = 0  # 8-bit states are taken to fit at all, never to fit more
    else:
        resident = _most(layers - 1, lambda n: budget.gpu_bytes - gpu_bytes(ledger(n, 0)))
    left = layers - resident
    held = _most(left, lambda n: budget.host_bytes - host_bytes(ledger(resident, left - n)))
    held = left if recipe.weights else held  # synthetic weights have no place on disk
    return _choice(spec, recipe, replace(settings, streamed=left, on_disk=left - held), budget)


def _most(limit: int, room: Callable[[int], int]) -> int:
    """The largest number up to ``limit`` that leaves room, 0 when none does; each takes as much as the first did."""
    if limit < 1 or (free := room(0)) < 0:
        return 0
    number = min(limit, free // max(1, free - room(1)))
    while number < limit and room(number + 1) >= 0:
        number += 1
    while number and room(number) < 0:
        number -= 1
    return number


def _candidates(
    spec: ModelSpec, recipe: Recipe, budget: MemoryBudget, weights: Weights, work: Work
) -> Iterator[Settings]:
    length = sequence_length(spec, recipe)
    group = group_of(recipe, length) if work == "train" else None
    for recompute, offload in _kept(recipe, weights, work):
        for batch_size, accum in _sizes(recipe, length, budget.device, work):
            for at_once in _groups(spec, recipe, weights, accum) if work != "chat" else [accum]:
                yield Settings(
                    max_seq_len=length,
                    batch_size=batch_size,
                    grad_accum=accum,
                    dtype=compute_dtype(recipe, budget),
                    recompute=recompute,
                    offload=offload,
                    optimizer=recipe.optimizer or "adamw",
                    lr=recipe.lr or default_lr(recipe.method),
                    streamed=spec.num_layers if weights == "streamed" else 0,
                    at_once=at_once,
                    mlp_tiles=recipe.mlp_tiles or 1,
                    work=work,
                    s2_group=group,
                )


def _tiled(choices: list[Choice], recipe: Recipe) -> Iterator[Settings]:
    """The settings with norms and MLPs in tiles, where even the smallest micro-batch has more than one."""
    every = [choice.settings for choice in choices]
    possible = recipe.mlp_tiles is None and recipe.method not in WEIGHTS and not recipe.lora_dropout
    if not possible or min(s.tokens for s in every) <= TILE_TOKENS:
        return
    for settings in every:
        if settings.recompute == "layer":
            yield replace(settings, mlp_tiles=-(-settings.tokens // TILE_TOKENS))


def _groups(spec: ModelSpec, recipe: Recipe, weights: Weights, accum: int) -> list[int]:
    """How many micro-batches may pass a layer together: a step's share in 1, 2, 3 ... groups. Of equally fast ones the
    first is taken: the whole step for who asks for ``layer``, else as few as do.

    Raises:
        InputError: ``layer`` is asked for, and the head is trained and is the embedding too: its gradient from the ends
            of all micro-batches would come before those from their beginnings, and round in another order.
    """
    twice = spec.tied and trains_tables(spec, recipe)
    if weights == "resident" or recipe.stream_order == "micro-batch" or (twice and recipe.stream_order == "auto"):
        return [1]
    if twice:
        raise InputError(
            f"--stream-order layer: {spec.name} has one table as embedding and head, whose gradients would round in"
            " another order.",
            next_step="Use --no-lisa-train-embeddings, or --stream-order micro-batch.",
        )
    sizes = {-(-accum // groups) for groups in range(1, accum + 1)}
    if recipe.stream_order == "layer" and accum > 1:
        return sorted(sizes - {1}, reverse=True)
    return sorted(sizes)


def _kept(recipe: Recipe, weights: Weights, work: Work) -> Iterator[tuple[Recompute, bool]]:
    """What the backward pass computes again, and whether layer inputs wait on the host, the fastest first."""
    if work != "train":
        yield "layer", False
        return
    levels: tuple[Recompute, ...] = ("none", "mlp", "layer") if recipe.recompute == "auto" else (recipe.recompute,)
    for level in levels:
        if (weights == "streamed" or (recipe.mlp_tiles or 1) > 1) and level != "layer":
            continue  # a layer that has left must be there again before anything of it can be used
        # Where layers stream, the memory of their inputs is better spent on layers that stay.
        auto = (True,) if weights == "streamed" else (False, True)
        offloads = {"off": (False,), "on": (True,), "auto": auto}[recipe.offload_activations]
        for offload in offloads:
            if level == "layer" or not offload:
                yield level, offload


def _sizes(recipe: Recipe, length: int, device: str, work: Work) -> Iterator[tuple[int, int]]:
    """Samples of a micro-batch, and micro-batches of a step. In chat every conversation is a micro-batch."""
    for size in _batch_sizes(recipe, length, device):
        accum = recipe.grad_accum or max(1, round(SAMPLES_PER_STEP / size))
        yield (1, size) if work == "chat" else (size, accum)


def _batch_sizes(recipe: Recipe, length: int, device: str) -> list[int]:
    """The recipe's micro-batch, or powers of two up to the samples of a step."""
    if recipe.batch_size:
        return [recipe.batch_size]
    most = max(1, SAMPLES_PER_STEP // (recipe.grad_accum or 1))
    if device == "cpu":
        most = min(most, max(1, CPU_MICRO_BATCH_TOKENS // length))
    return [2**power for power in range(most.bit_length())]
