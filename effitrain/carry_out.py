"""A plan carried out: load, prune, probe, train, recover, save and report.

``api.run`` decides what is done; here it happens, in the order in which it is read.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from effitrain.adapters.base import AdapterConfig
from effitrain.core.blobs import SLOTS
from effitrain.core.budget import MemoryBudget
from effitrain.core.cut import alignment_recipe, small_spec
from effitrain.core.errors import BudgetError, InputError
from effitrain.core.methods import CHANGES_MODEL, SAMPLED
from effitrain.core.placement import Placement, place
from effitrain.core.plan import Plan, for_tokens, make_plan, resolve
from effitrain.core.recipe import Recipe
from effitrain.core.report import Report
from effitrain.data.batches import Batches, longest, most_trained
from effitrain.data.prepare import PreparedData, prepare_data
from effitrain.evals.events import Events
from effitrain.evals.positions import ByPosition
from effitrain.evals.recovered import compare, facts
from effitrain.evals.scores import Scores
from effitrain.evals.walked import ends
from effitrain.io.atomic import remove_stale, write_json
from effitrain.io.keep import KEEP, write_keep
from effitrain.io.run_folder import RunFolder, open_run
from effitrain.model.decoder import Decoder
from effitrain.model.load import Base, find_base
from effitrain.pruning.calibration import calibrate
from effitrain.pruning.loraprune import LoRAPrune
from effitrain.pruning.recover import recover_adapter
from effitrain.pruning.small import Small, Training, make_small
from effitrain.report.files import rope_figures, stream_figures, write_report
from effitrain.stream.engine import Span, Traffic
from effitrain.train.hooks import (
    Calls,
    Checkpoints,
    EveryN,
    Hook,
    Listener,
    MetricsFile,
    StopOnSignal,
    Tracker,
)
from effitrain.train.job import Job, assemble, chosen, make_batches, resume, save_and_reload, save_model
from effitrain.train.loop import train
from effitrain.train.memory import Meter, cap_memory
from effitrain.train.probe import OverBudget, probe
from effitrain.train.state import TrainState, checkpoints


def carry_out(
    recipe: Recipe, folder: RunFolder, the_plan: Plan, budget: MemoryBudget, base: Base, events: Events
) -> Report:
    """Load, (prune), probe, train, (recover), save and report what the plan says.

    Raises:
        OverBudget: a trial step takes more than the budget, or the allocator refuses more.
    """
    try:
        return _carry_out(recipe, folder, the_plan, budget, base, events)
    except torch.OutOfMemoryError:
        raise OverBudget(the_plan, None) from None


def _carry_out(
    recipe: Recipe, folder: RunFolder, the_plan: Plan, budget: MemoryBudget, base: Base, events: Events
) -> Report:
    remove_stale(folder.path)
    if recipe.rope_scaling != "none":
        write_json(folder.path / "config.json", dict(base.source.config))
    pruning = recipe.prune_method if the_plan.fit == "prune" else None
    store_is_enough = the_plan.settings.streamed and not pruning and recipe.method not in SAMPLED
    base = base.to_stream() if store_is_enough else base.fetched()
    if base.remote:
        hub_id = base.remote.hub_id
        events.note(f"{hub_id} at commit {base.remote.revision}; --model {hub_id}@REVISION takes another.")
    data = prepare_data(recipe, base.tokenizer(), chosen(recipe.max_seq_len))
    if not checkpoints(folder.path / "checkpoints"):
        folder = folder.note(evals=[], positions=[])  # of a run of another recipe that never took a step
    folder = _same_inputs(folder, data=data.fingerprint, model=base.fingerprint())
    events.data(data)
    device = torch.device(budget.device)
    meter = Meter(device)
    cap(device, the_plan)
    small = _make_small(recipe, base, data, budget, folder, events) if pruning == "loram" else None
    trained_on, adapter = (small.base.at_positions(base.source.config), "adapter-small") if small else (base, "adapter")
    if small:
        events.note("Training on the small model: losses by step are its own.")
    trained = _train(recipe, the_plan, budget, meter, folder, trained_on, data, events, adapter)
    pruned, points = None, trained.points
    if small:
        bundle = recover_adapter(folder.path / adapter, small.keep, base, folder.path / "adapter")
        batches = make_batches(data.eval, recipe)
        pruned, points = compare(recipe, base, device, batches, bundle, points, events.evaluated)
    elif pruning:
        pruned = facts(recipe, points, [])
    elif recipe.method == "lisa" and recipe.quant != "none":  # trained beside layers in 4 bits, which the model is not
        whole = find_base(str(folder.path / "model"))
        points = ends(recipe, base, whole, device, make_batches(data.eval, recipe), points, events.evaluated)
    positions = None if small else trained.positions  # of the full-size model alone
    seen = (data.stats, points, meter.peak(), trained.stream, trained.timeline, pruned, positions)
    rope = rope_figures(recipe, base.spec, base.name, folder.path)
    return write_report(folder.path, recipe, trained.plan, trained.state, *seen, rope, trained.lisa)


@dataclass(frozen=True)
class Trained:
    """Where training ended, the plan for the longest micro-batch of the data, losses on the evaluation set by step and
    by position, and what streaming and LISA did.
    """

    state: TrainState
    plan: Plan
    points: list[tuple[int, float]]
    stream: Mapping[str, Any] | None
    timeline: Sequence[Span]
    positions: ByPosition | None
    lisa: Mapping[str, Any] | None


def _train(
    recipe: Recipe, the_plan: Plan, budget: MemoryBudget, meter: Meter, folder: RunFolder, base: Base,
    data: PreparedData, events: Events, adapter: str,
) -> Trained:  # fmt: skip
    """Train, and save the adapter or what LoRAPrune leaves."""
    job = assemble(
        recipe,
        base,
        data.train,
        meter.device,
        lambda part: events.loaded(part, base.spec.num_layers),
        placement_of(the_plan),
        the_plan.settings.at_once,
        events.stored,
    )
    for warning in _pageable(job.decoder):
        events.note(warning)
    pruner = None
    if the_plan.fit == "prune" and recipe.prune_method == "loraprune":
        pruner = LoRAPrune(job.decoder, job.adapters, small_spec(base.spec, recipe).widths, job.course.steps)
        job.trainable.update(pruner.state())
    evaluated = make_batches(data.eval, recipe)
    tokens, trained = len(longest(job.batches).input_ids), most_trained(job.batches)
    expected = for_tokens(the_plan, base.spec, recipe, budget, tokens, trained)
    _prove_budget(job, expected, meter, evaluated)

    checkpoint_folder = folder.path / "checkpoints"
    state = resume(recipe, checkpoint_folder, job, events.note)
    whose = "of the small model " if adapter == "adapter-small" else ""
    told = lambda when, evaluation: events.evaluated(whose + when, evaluation)  # noqa: E731
    scores = Scores(job.decoder, evaluated, folder, state, told, the_plan.settings.at_once)
    if not scores.points:
        scores.add("before")
    every = recipe.save_every or max(1, job.course.steps // 10)
    saver = Checkpoints(
        checkpoint_folder, job.trainable, job.optimizer, every, recipe.keep_checkpoints, job.course.steps
    )
    with StopOnSignal(saver) as stop:
        events.training(state.step, job.course.steps)
        hooks = [*([job.lisa] if job.lisa else []), *_watchers(recipe, folder, state, scores, events), saver, stop]
        if pruner:
            hooks.insert(0, Calls(pruner.after_backward, pruner.after_step))
        before = _traffic(job.decoder)
        train(job.decoder, job.batches, job.optimizer, job.course, state, job.clock, hooks, meter.peak)
        after = _traffic(job.decoder)
        timeline = job.decoder.streamer.engine.timeline() if job.decoder.streamer else []
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
    if len(scores.points) < 2 or scores.points[-1][0] < state.step:
        scores.add("after")
    stream = None
    if after and job.decoder.streamer:
        settings, written = the_plan.settings, job.decoder.streamer.host.written()
        layers = (settings.streamed, the_plan.resident_layers)
        stream = stream_figures(before, after, *layers, settings.at_once, written)
    turns = job.lisa.facts() if job.lisa else None
    return Trained(state, expected, scores.points, stream, timeline, scores.by_position(), turns)


def _make_small(
    recipe: Recipe, base: Base, data: PreparedData, budget: MemoryBudget, folder: RunFolder, events: Events
) -> Small:
    """The small model of a run that prunes, in ``small/``, and its keep map beside it."""
    device = torch.device(budget.device)
    target, train_all = folder.path / "small", aligning_run(recipe, budget, events.note)
    small = make_small(base, recipe, lambda: calibrate(recipe, base, data), device, target, events.note, train_all)
    write_keep(folder.path / KEEP, small.keep)
    return small


def aligning_run(recipe: Recipe, budget: MemoryBudget, tell: Callable[[str], None]) -> Training:
    """How ``--align train`` trains the small model: a run of its own, planned for the same budget.

    The training that is returned raises BudgetError where all weights of the small model cannot be trained within it.
    """

    def train_all(model: Path, out: Path) -> tuple[Path, dict[str, Any]]:
        asked = alignment_recipe(recipe).changed(model=str(model), output_dir=str(out))
        base, folder = find_base(str(model)).fetched(), open_run(asked)
        the_plan = make_plan(base.spec, asked, budget)
        if not the_plan.fits:
            raise _too_large_to_train(the_plan, the_plan.reasons[0])
        resolved = resolve(asked, the_plan)
        tell(f"Aligning by training all {base.spec.params:,} weights of the small model.")
        if not folder.finished:
            folder = folder.note(recipes=[asked.result_fields(), resolved.result_fields()])
            try:
                carry_out(resolved, folder, the_plan, budget, base, Events())
            except OverBudget as error:
                raise _too_large_to_train(the_plan, error.fact) from None
        report = Report.read(out / "report.json")
        before, after = report.loss.eval_before, report.loss.eval_after
        if before is not None and after is not None:
            tell(f"Aligned: evaluation loss {before:.4f} before, {after:.4f} after {report.steps} steps.")
        return out / "model", {"steps": report.steps, "before": before, "after": after}

    return train_all


def _too_large_to_train(the_plan: Plan, fact: str) -> BudgetError:
    return BudgetError(
        f"--align train trains every weight of the small model. {fact}",
        "It keeps master weights, gradients and moments in float32.",
        "Use --align lsq, which has one layer in memory, or a larger --prune-ratio.",
        the_plan,
    )


def _watchers(recipe: Recipe, folder: RunFolder, state: TrainState, scores: Scores, events: Events) -> list[Hook]:
    hooks: list[Hook] = [MetricsFile(folder.path / "metrics.jsonl", state.step), Listener(events.step)]
    if recipe.eval_every:
        hooks.append(EveryN(recipe.eval_every, lambda state: scores.add(f"step {state.step}")))
    if recipe.report_to != "none":
        hooks.append(Tracker(recipe.report_to, folder.path))
    return hooks


def _same_inputs(folder: RunFolder, **fingerprints: str) -> RunFolder:
    """Note what the run is made from; refuse to go on from a checkpoint when data or model changed since."""
    trained = bool(checkpoints(folder.path / "checkpoints"))
    before = folder.notes.get("inputs", fingerprints) if trained else fingerprints
    changed = [name for name, value in fingerprints.items() if before.get(name) != value]
    if changed:
        raise InputError(
            f"{folder.path} holds a run whose {' and '.join(changed)} changed since it began.",
            next_step="Name another output folder with -o, or put the old files back.",
        )
    return folder.note(inputs=fingerprints)


def placement_of(the_plan: Plan) -> Placement | None:
    """Which layers stream, as the plan says; None where none does."""
    if not the_plan.settings.streamed:
        return None
    return place(the_plan.model.layers, the_plan.resident_layers, SLOTS, the_plan.settings.on_disk)


def _traffic(decoder: Decoder) -> Traffic | None:
    """What was copied so far."""
    return replace(decoder.streamer.traffic) if decoder.streamer else None


def _pageable(decoder: Decoder) -> Iterator[str]:
    """What it costs that the system refused to pin host memory."""
    count = len(decoder.streamer.host.pageable) if decoder.streamer else 0
    if count:
        yield (
            f"{count} layers could not be pinned in host memory: their copies take a detour through a pinned buffer and"
            " can be several times slower. `ulimit -l unlimited` lets a process pin more."
        )


def cap(device: torch.device, the_plan: Plan) -> None:
    """Keep the allocator within the budget, on a card."""
    if device.type == "cuda":
        cap_memory(the_plan.budget_bytes, the_plan.overhead_bytes)


def _prove_budget(job: Job, the_plan: Plan, meter: Meter, evaluated: Batches) -> None:
    """A trial step and evaluation on the longest micro-batches, before training.

    Raises:
        OverBudget: they take more than the budget.
    """
    largest = longest(job.batches)
    last = longest(evaluated) if evaluated.per_epoch else None
    at_once = the_plan.settings.at_once
    try:
        probe(job.decoder, [largest] * at_once, job.optimizer, job.clock, meter, at_once, last)
    except torch.OutOfMemoryError:
        raise OverBudget(the_plan, None) from None
    if meter.peak() > the_plan.budget_bytes:
        raise OverBudget(the_plan, meter.peak())
