"""A training job put together: model, adapters, optimizer, data and course; where it goes on from; what it saves."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from effitrain.adapters.base import Adapter, AdapterConfig, Clock
from effitrain.adapters.full import load_in_full, trained_in_full
from effitrain.adapters.storage import load_into, read_adapter, save_adapter
from effitrain.core.errors import InputError
from effitrain.core.placement import Placement
from effitrain.core.recipe import Recipe
from effitrain.data.batches import Batches
from effitrain.data.tokenized import TokenSet
from effitrain.model.decoder import Decoder
from effitrain.model.load import DTYPES, Base, load_model
from effitrain.model.save import write_model
from effitrain.stream.offload import Offload
from effitrain.train.lisa import Lisa
from effitrain.train.loop import Course
from effitrain.train.optim import make_optimizer
from effitrain.train.state import TrainState, checkpoints, load_checkpoint, remove_after, step_of
from effitrain.train.trainable import make_trainable

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """The loop's parts, and the course it runs; ``lisa`` is one of its hooks, where layers take turns."""

    decoder: Decoder
    adapters: dict[str, Adapter]
    clock: Clock
    trainable: dict[str, torch.Tensor]
    optimizer: torch.optim.Optimizer
    batches: Batches
    course: Course
    lisa: Lisa | None = None


def assemble(
    recipe: Recipe,
    base: Base,
    batches: Batches,
    device: torch.device,
    progress: Callable[[str], None] = lambda name: None,
    placement: Placement | None = None,
    at_once: int = 1,
    stored: Callable[[int, int], None] = lambda done, parts: None,
) -> Job:
    """Load the model and put the rest around it.

    Args:
        recipe: with every choice made.
        base: with its files on disk.
        batches: to train on, as ``make_batches`` makes them.
        device: where to.
        progress: told each layer that is in place.
        placement: which layers are streamed; None for none.
        at_once: micro-batches of a step that pass a layer before the next one is needed.
        stored: told how many parts of the store are done, of how many.
    """
    decoder = load_model(base, recipe, device, progress, placement, stored)
    keep_less(decoder, recipe, len(batches.longest.input_ids), at_once)
    clock = Clock(recipe.seed)
    made = make_trainable(decoder, recipe, clock, base.weights)
    optimizer = make_optimizer(chosen(recipe.optimizer), made.parameters, chosen(recipe.lr), recipe.weight_decay)
    if made.lisa:
        made.lisa.optimizer = optimizer
    course = make_course(recipe, batches, at_once)
    return Job(decoder, made.adapters, clock, made.tensors, optimizer, batches, course, made.lisa)


def keep_less(decoder: Decoder, recipe: Recipe, tokens: int, at_once: int = 1) -> None:
    """Recompute and offload as ``recipe``, with every choice made, says. No micro-batch has more than ``tokens``
    tokens, and ``at_once`` of them pass each layer together.
    """
    decoder.set_recompute(recipe.recompute)
    decoder.set_tile(tile_of(recipe))
    if recipe.offload_activations == "on":
        dtype = DTYPES[recipe.dtype]
        decoder.offload = Offload(len(decoder.layers) * at_once, tokens, decoder.spec.hidden, dtype, decoder.device)


def tile_of(recipe: Recipe) -> int | None:
    """Tokens of a tile; None where all tokens of a micro-batch go at once."""
    tokens, tiles = chosen(recipe.batch_size) * chosen(recipe.max_seq_len), chosen(recipe.mlp_tiles)
    return -(-tokens // tiles) if tiles > 1 else None


def make_course(recipe: Recipe, batches: Batches, at_once: int) -> Course:
    """The steps that ``recipe`` takes with ``batches``, and their pace."""
    accum = chosen(recipe.grad_accum)
    in_epochs = math.ceil(batches.per_epoch * recipe.epochs)
    steps = recipe.max_steps or math.ceil(in_epochs / accum)
    micro_batches = steps * accum if recipe.max_steps else in_epochs
    pace = (chosen(recipe.lr), recipe.schedule, recipe.warmup, recipe.max_grad_norm)
    return Course(steps, micro_batches, accum, *pace, at_once)


def resumed_from(recipe: Recipe, folder: Path) -> Path | None:
    """The checkpoint to go on from: a named one, or the newest in ``folder``; None from the beginning."""
    if recipe.resume == "auto":
        return next(reversed(checkpoints(folder)), None)
    return None if recipe.resume == "never" else Path(recipe.resume)


def resume(recipe: Recipe, folder: Path, job: Job, tell: Callable[[str], None]) -> TrainState:
    """The state of the checkpoint that ``resumed_from`` names, or that of the beginning.

    Checkpoints of later steps are removed: they belong to what is now done again.

    Raises:
        InputError: no checkpoint, a damaged one, or one from beyond the end of the run.
    """
    newest = resumed_from(recipe, folder)
    if job.lisa:
        job.lisa.begin(step_of(newest) if newest else 0)
    state = load_checkpoint(newest, job.trainable, job.optimizer) if newest else TrainState()
    if state.step > job.course.steps:
        raise InputError(
            f"{newest} is after step {state.step}, and this run has {job.course.steps}.",
            next_step="Raise --max-steps, or name an earlier checkpoint with --resume.",
        )
    if newest:
        tell(f"Going on from {newest}, after step {state.step} of {job.course.steps}.")
    remove_after(folder, state.step)
    return state


def save_model(job: Job, recipe: Recipe, target: Path, base: Base) -> None:
    """Save the model with its trained weights as a folder, rounded as they were in the last forward pass."""
    trained = {**job.lisa.always, **job.lisa.home.trained()} if job.lisa else job.trainable
    write_model(target, base, trained, DTYPES[recipe.dtype])


def save_and_reload(job: Job, recipe: Recipe, target: Path, base_name: str) -> None:
    """Save the adapter and load it back, so that what is evaluated afterwards is what was saved."""
    factors = {path: adapter.factors() for path, adapter in job.adapters.items()}
    save_adapter(target, factors, AdapterConfig.of(recipe), base_name, full=trained_in_full(job.decoder))
    bundle = read_adapter(target)
    load_into(job.adapters, bundle, str(target))
    load_in_full(job.decoder, bundle.full)


def make_batches(tokens: TokenSet, recipe: Recipe) -> Batches:
    """The micro-batches that ``recipe`` makes of ``tokens``."""
    return Batches(tokens, chosen(recipe.batch_size), chosen(recipe.max_seq_len), recipe.packing, recipe.seed)


def chosen(value: T | None) -> T:
    """A choice that the plan has made."""
    assert value is not None
    return value
