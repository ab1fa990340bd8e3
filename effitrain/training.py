"""The training part of a run: a job put together and tried out, trained under its watchers, and saved."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from effitrain.adapters.base import AdapterConfig
from effitrain.core.blobs import SLOTS
from effitrain.core.budget import MemoryBudget
from effitrain.core.cut import small_spec
from effitrain.core.disk import save_interval
from effitrain.core.methods import CHANGES_MODEL
from effitrain.core.placement import Placement, place
from effitrain.core.plan import Plan, for_tokens
from effitrain.core.recipe import Recipe
from effitrain.data.batches import Batches
from effitrain.data.prepare import PreparedData
from effitrain.evals.events import Events
from effitrain.evals.perplexity import Evaluation
from effitrain.evals.samples import Samples, choose, has_room
from effitrain.evals.scores import Scores
from effitrain.io.run_folder import RunFolder
from effitrain.model.load import Base
from effitrain.pruning.loraprune import LoRAPrune
from effitrain.report.files import Outcome, stream_figures
from effitrain.stream.engine import Span
from effitrain.stream.streamer import Streamer
from effitrain.train.hooks import (
    Calls,
    Checkpoints,
    EveryN,
    Hook,
    Listener,
    MetricsFile,
    StepRecord,
    StopOnSignal,
    Tracker,
)
from effitrain.train.job import Job, assemble, make_batches, resume, save_and_reload, save_model
from effitrain.train.loop import train
from effitrain.train.memory import Meter, cap_memory, device_allocations
from effitrain.train.probe import OverBudget, probe
from effitrain.train.state import TrainState

WARM_STEPS = 2  # after these every buffer of a step is there


def train_model(
    recipe: Recipe, the_plan: Plan, budget: MemoryBudget, meter: Meter, folder: RunFolder, base: Base,
    data: PreparedData, batches: Batches, events: Events, adapter: str,
) -> Outcome:  # fmt: skip
    """Train ``base`` and save, in ``folder``, the adapter under the name ``adapter``, or the model that was changed.

    ``batches`` are those of the training data. What is told afterwards is of ``base``.

    Raises:
        OverBudget: a trial step takes more than the budget.
    """
    job = _assembled(recipe, the_plan, meter.device, base, batches, events)
    pruner = _pruner(job, recipe, the_plan, base)
    evaluated = make_batches(data.eval, recipe)
    tokens = len(job.batches.longest.input_ids)
    expected = for_tokens(the_plan, base.spec, recipe, budget, tokens, job.batches.most_trained)
    _prove_budget(job, expected, meter, evaluated)

    state = resume(recipe, folder.path / "checkpoints", job, events.note)
    samples = _samples(job, recipe, expected, budget, base, data) if adapter != "adapter-small" else None
    scores = _scores(job, recipe, the_plan, evaluated, folder, state, events, adapter, samples)
    if not scores.points:
        scores.add("before")
    watch = StreamWatch(job.decoder.streamer, the_plan, meter.device)
    saver = _saver(job, recipe, folder)
    with saver, StopOnSignal(saver) as stop:
        events.training(state.step, job.course.steps)
        first = [Calls(pruner.after_backward, pruner.after_step)] if pruner else []
        turns = [job.lisa] if job.lisa else []
        watchers = _watchers(recipe, folder, state, scores, job.course.steps, events)
        hooks = [watch, *first, *turns, *watchers, saver, stop]
        train(job.decoder, job.batches, job.optimizer, job.course, state, job.clock, hooks, meter.peak)
    stream, timeline = watch.figures(), watch.timeline()
    _save(job, pruner, recipe, folder, base, adapter)
    if len(scores.points) < 2 or scores.points[-1][0] < state.step:
        scores.add("after")
    return Outcome(
        *(recipe, expected, state, data.stats, scores.points, meter.peak()),
        stream=stream,
        timeline=timeline,
        positions=scores.by_position(),
        samples=scores.read(),
        lisa=job.lisa.facts(state) if job.lisa else None,
    )


class StreamWatch(Hook):
    """What streaming does from now on, and how often a step asked the device for memory when every buffer was there."""

    def __init__(self, streamer: Streamer | None, the_plan: Plan, device: torch.device):
        self.streamer, self.plan, self.device = streamer, the_plan, device
        self.before = replace(streamer.traffic) if streamer else None
        self.steps = 0
        self.asked: int | None = None
        self._at_start: int | None = None

    def before_step(self, state: TrainState) -> None:
        """What is asked for between steps, evaluations and saving, is not counted."""
        self._at_start = device_allocations(self.device)

    def after_step(self, state: TrainState, record: StepRecord) -> None:
        """Count from the step on that finds every buffer there."""
        self.steps += 1
        now = device_allocations(self.device)
        if self.steps > WARM_STEPS and now is not None and self._at_start is not None:
            self.asked = (self.asked or 0) + now - self._at_start

    def figures(self) -> dict[str, Any] | None:
        """The ``stream`` part of the report; None where nothing streams."""
        if self.streamer is None:
            return None
        settings, written = self.plan.settings, self.streamer.host.written()
        layers = (settings.streamed, self.plan.resident_layers)
        return stream_figures(self.before, self.streamer.traffic, *layers, settings.at_once, written, self.asked)

    def timeline(self) -> Sequence[Span]:
        """What was copied and computed when, in the last pass."""
        return self.streamer.engine.timeline() if self.streamer else []


def placement_of(the_plan: Plan) -> Placement | None:
    """Which layers stream, as the plan says; None where none does."""
    if not the_plan.settings.streamed:
        return None
    return place(the_plan.model.layers, the_plan.resident_layers, SLOTS, the_plan.settings.on_disk)


def cap(device: torch.device, the_plan: Plan) -> None:
    """Keep the allocator within the budget, on a card."""
    if device.type == "cuda":
        cap_memory(the_plan.budget_bytes, the_plan.overhead_bytes)


def _assembled(
    recipe: Recipe, the_plan: Plan, device: torch.device, base: Base, batches: Batches, events: Events
) -> Job:
    """The job; says what it costs where the system refuses to pin host memory."""
    job = assemble(
        recipe,
        base,
        batches,
        device,
        lambda part: events.loaded(part, base.spec.num_layers),
        placement_of(the_plan),
        the_plan.settings.at_once,
        events.stored,
    )
    count = len(job.decoder.streamer.host.pageable) if job.decoder.streamer else 0
    if count:
        events.note(
            f"{count} layers could not be pinned in host memory: their copies take a detour through a pinned buffer and"
            " can be several times slower. `ulimit -l unlimited` lets a process pin more."
        )
    return job


def _pruner(job: Job, recipe: Recipe, the_plan: Plan, base: Base) -> LoRAPrune | None:
    """What prunes while the job trains; its state is saved and restored with the job's."""
    if the_plan.fit != "prune" or recipe.prune_method != "loraprune":
        return None
    pruner = LoRAPrune(job.decoder, job.adapters, small_spec(base.spec, recipe).widths, job.course.steps)
    job.trainable.update(pruner.state())
    return pruner


def _scores(
    job: Job, recipe: Recipe, the_plan: Plan, evaluated: Batches, folder: RunFolder, state: TrainState, events: Events,
    adapter: str, samples: Samples | None,
) -> Scores:  # fmt: skip
    whose = "of the small model " if adapter == "adapter-small" else ""
    form = " (frozen layers in NF4)" if recipe.method == "lisa" and recipe.quant == "nf4" else ""  # not as it is saved

    def told(when: str, evaluation: Evaluation) -> None:
        events.evaluated(f"{whose}{when}{form}", evaluation)

    return Scores(job.decoder, evaluated, folder, state, told, the_plan.settings.at_once, samples)


def _samples(
    job: Job, recipe: Recipe, expected: Plan, budget: MemoryBudget, base: Base, data: PreparedData
) -> Samples | None:
    """What the report shows answers to; None where layers stream, since each token would fetch them all once more, and
    where answering would take more memory than training.
    """
    asked = choose(data.eval)
    if not asked or job.decoder.streamer or not has_room(asked, base.spec, recipe, expected, budget):
        return None
    return Samples(job.decoder, base.tokenizer(), recipe.template, asked)


def _saver(job: Job, recipe: Recipe, folder: RunFolder) -> Checkpoints:
    target, steps = folder.path / "checkpoints", job.course.steps
    every = save_interval(recipe, steps)
    return Checkpoints(target, job.trainable, job.optimizer, every, recipe.keep_checkpoints, steps)


def _watchers(
    recipe: Recipe, folder: RunFolder, state: TrainState, scores: Scores, steps: int, events: Events
) -> list[Hook]:
    def evaluate(state: TrainState) -> None:
        if state.step < steps:  # the last evaluation is of what was saved
            scores.add(f"step {state.step}")

    hooks: list[Hook] = [MetricsFile(folder.path / "metrics.jsonl", state.step), Listener(events.step)]
    if recipe.eval_every:
        hooks.append(EveryN(recipe.eval_every, evaluate))
    if recipe.report_to != "none":
        hooks.append(Tracker(recipe.report_to, folder.path))
    return hooks


def _save(job: Job, pruner: LoRAPrune | None, recipe: Recipe, folder: RunFolder, base: Base, adapter: str) -> None:
    """Save what the run is for."""
    if job.lisa:
        job.lisa.end()
    if pruner:
        pruner.write(base, AdapterConfig.of(recipe), folder.path / "model")
        if recipe.quant == "nf4":
            pruner.write(base, AdapterConfig.of(recipe), folder.path / "model-nf4", nf4=True)
    elif recipe.method in CHANGES_MODEL:
        save_model(job, recipe, folder.path / "model", base)
    else:
        save_and_reload(job, recipe, folder.path / adapter, base.name)


def _prove_budget(job: Job, the_plan: Plan, meter: Meter, evaluated: Batches) -> None:
    """A trial step and evaluation on the longest micro-batches, before training.

    Raises:
        OverBudget: they take more than the budget.
    """
    last = evaluated.longest if evaluated.per_epoch else None
    at_once = the_plan.settings.at_once
    try:
        probe(job.decoder, [job.batches.longest] * at_once, job.optimizer, job.clock, meter, at_once, last)
    except torch.OutOfMemoryError:
        raise OverBudget(the_plan, None) from None
    if meter.peak() > the_plan.budget_bytes:
        raise OverBudget(the_plan, meter.peak())
