"""The verbs as functions: they take and return plain values and print nothing.

``run`` reads top to bottom: what is asked, whether it can be had, the plan, then the plan carried out.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from effitrain.adapters.attach import attach
from effitrain.adapters.base import Clock, adapter_class
from effitrain.adapters.merge import check_fits, merge
from effitrain.adapters.storage import adapter_folder, load_into, read_adapter, save_adapter
from effitrain.core.budget import MemoryBudget
from effitrain.core.errors import InputError
from effitrain.core.memory import SLOTS
from effitrain.core.plan import Plan, make_plan, refusal, resolve
from effitrain.core.recipe import RUNTIME_FIELDS, Recipe, make_recipe, read_recipe_file
from effitrain.core.report import Report
from effitrain.core.spec import ModelSpec, spec_from_config
from effitrain.data.batches import Batches, longest
from effitrain.data.prepare import PreparedData, check_data, prepare_data
from effitrain.evals.chat import ChatSession
from effitrain.evals.perplexity import Evaluation, evaluate_loss
from effitrain.io.atomic import remove_stale, write_json, write_text
from effitrain.io.checkpoint import open_checkpoint
from effitrain.io.hub import fetch_weights, find_model
from effitrain.io.machine import find_budget
from effitrain.io.run_folder import RunFolder, open_run
from effitrain.model.decoder import Decoder
from effitrain.model.load import Base, find_base, load_model
from effitrain.planning import plan, recipe
from effitrain.report.files import stream_figures, write_report
from effitrain.stream.engine import Traffic
from effitrain.stream.placement import Placement, place
from effitrain.train.hooks import (
    Checkpoints,
    EveryN,
    Hook,
    Listener,
    MetricsFile,
    StepRecord,
    StopOnSignal,
    Tracker,
    check_tracker,
)
from effitrain.train.job import Job, assemble, chosen, make_batches, resume, save_and_reload
from effitrain.train.loop import train
from effitrain.train.memory import Meter, cap_memory
from effitrain.train.probe import OverBudget, probe
from effitrain.train.proof import proved
from effitrain.train.state import TrainState, check_checkpoint, checkpoints

__all__ = ["Events", "chat", "evaluate", "export", "plan", "prove", "recipe", "run"]


class Events:
    """What ``run`` tells while it works; every method does nothing. The command line prints from here."""

    def note(self, text: str) -> None:
        """Something worth knowing."""

    def planned(self, plan: Plan) -> None:
        """The plan, before anything is loaded."""

    def loaded(self, part: str, layers: int) -> None:
        """A layer of ``layers`` is in place."""

    def stored(self, done: int, parts: int) -> None:
        """``done`` of ``parts`` of the store that layers stream from are built."""

    def data(self, data: PreparedData) -> None:
        """The data, with one masked sample."""

    def evaluated(self, when: str, evaluation: Evaluation) -> None:
        """A loss on the evaluation set: ``before``, ``after`` or ``step N``."""

    def training(self, done: int, steps: int) -> None:
        """Training begins, or goes on, at step ``done``."""

    def step(self, record: StepRecord) -> None:
        """A step is done."""


def prove(recipe: Recipe) -> Plan:
    """The plan of ``recipe`` with its ``proof``: the real training step run on shapes alone, every tensor counted."""
    made = plan(recipe)
    source = find_model(recipe.model)
    spec = spec_from_config(source.config, recipe.model)
    return proved(made, spec, source.config, recipe, "cuda" if made.overhead_bytes else "cpu")


def run(recipe: Recipe, events: Events | None = None, dry_run: bool = False, prove_plan: bool = False) -> Report | None:
    """Plan, load, train, evaluate, report. The run folder is the state: the same call goes on after a kill.

    Args:
        recipe: what to do.
        events: told of progress.
        dry_run: stop after the plan, and return None.
        prove_plan: run the step on shapes first, as ``prove`` does.

    Raises:
        InputError: something asked for is wrong or missing.
        BudgetError: nothing fits, or a trial step shows that the plan does not.
        Interrupted: asked to stop, after saving.
    """
    events = events or Events()
    folder = open_run(recipe)
    if folder.finished and not dry_run:
        events.note(f"{folder.path} holds this run, finished. Nothing to do.")
        return Report.read(folder.path / "report.json")
    adapter_class(recipe.method)
    check_tracker(recipe.report_to)
    if recipe.gpu and not dry_run:
        raise InputError("--gpu plans for a card that is not here.", next_step="Use effitrain plan, or --dry-run.")
    if recipe.dataset is None:
        events.note("No --dataset: training on the built-in instruction set.")
    check_data(recipe)
    base = find_base(recipe.model, recipe.weights)
    _check_starting_points(recipe, base)
    asked, recipe = recipe, _as_before(recipe, folder)
    budget = find_budget(recipe)
    the_plan = make_plan(base.spec, recipe, budget)
    if prove_plan and the_plan.fits:
        the_plan = proved(the_plan, base.spec, base.source.config, recipe, budget.device)
    events.planned(the_plan)
    if not the_plan.fits:
        raise refusal(the_plan)
    if dry_run:
        return None
    _check_can_run(the_plan)
    device, resolved = _device(budget), resolve(recipe, the_plan)
    known = folder.notes["recipes"] if folder.knows(asked) else []
    folder = folder.note(recipes=sorted({*known, asked.fingerprint(), resolved.fingerprint()}))
    write_text(folder.path / "recipe.yaml", resolved.to_yaml())
    write_json(folder.path / "plan.json", the_plan.to_json())
    try:
        return _carry_out(resolved, the_plan, device, folder, base, events)
    except OverBudget as error:
        leaner = _leaner_plan(error, base.spec, recipe, budget)
        if leaner is None:
            raise
        events.note(f"{error.fact} Planning anew with less.")
        events.planned(leaner)
        resolved = resolve(recipe, leaner)
        folder = folder.note(recipes=sorted({*folder.notes["recipes"], resolved.fingerprint()}))
        write_text(folder.path / "recipe.yaml", resolved.to_yaml())
        write_json(folder.path / "plan.json", leaner.to_json())
        return _carry_out(resolved, leaner, device, folder, base, events)
    except torch.OutOfMemoryError as error:
        raise OverBudget(the_plan, None) from error


def evaluate(recipe: Recipe, adapter: str | None = None) -> dict[str, Any]:
    """Loss and perplexity of a model on a data set: ``{"loss", "perplexity", "tokens", "model", "adapter"}``.

    Args:
        recipe: model and data.
        adapter: an adapter folder, or a run folder that holds one.
    """
    recipe = recipe.changed(eval_fraction=0.0, eval_dataset=None)
    check_data(recipe)
    base, decoder, recipe = _ready(recipe, adapter)
    data = prepare_data(recipe, base.tokenizer(), chosen(recipe.max_seq_len))
    result = evaluate_loss(decoder, make_batches(data.train, recipe))
    scores = {"loss": result.loss, "perplexity": result.perplexity, "tokens": result.tokens}
    return {**scores, "model": recipe.model, "adapter": adapter}


def chat(recipe: Recipe, adapter: str | None = None) -> ChatSession:
    """Load a model, with or without an adapter, to talk to: ``chat(recipe).answer(messages)`` yields text."""
    base, decoder, recipe = _ready(recipe, adapter)
    return ChatSession(decoder, base.tokenizer(), recipe.template, recipe.seed)


def export(
    recipe: Recipe, adapter: str, target: str, to: str = "peft", progress: Callable[[str], None] = lambda name: None
) -> Path:
    """Write an adapter to a new folder, as a plain peft adapter or merged into the full-precision model.

    Args:
        recipe: names the model.
        adapter: an adapter folder, or a run folder that holds one.
        target: the new folder.
        to: ``peft`` or ``merged`` (bf16 shards, one tensor in memory at a time).
        progress: told the name of each tensor merged.

    Raises:
        InputError: the target exists, or adapter and model do not belong together.
    """
    path = Path(target)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} exists already.", next_step="Name a new folder with -o.")
    bundle = read_adapter(adapter_folder(adapter))
    base = find_base(recipe.model)
    check_fits(base.spec, bundle)
    if to == "merged":
        folder = fetch_weights(base.source)
        merge(folder, open_checkpoint(folder), bundle, path, progress=progress)
    else:
        save_adapter(path, bundle.tensors, bundle.config, base.name)
    return path


def _carry_out(
    recipe: Recipe, the_plan: Plan, device: torch.device, folder: RunFolder, base: Base, events: Events
) -> Report:
    """Load, probe, train, save and report what the plan says."""
    remove_stale(folder.path)
    base = base.to_stream() if the_plan.settings.streamed else base.fetched()
    data = prepare_data(recipe, base.tokenizer(), chosen(recipe.max_seq_len))
    folder = _same_inputs(folder, data=data.fingerprint, model=base.fingerprint())
    events.data(data)
    meter = Meter(device)
    _cap(device, the_plan)
    job = assemble(
        recipe,
        base,
        data.train,
        device,
        lambda part: events.loaded(part, base.spec.num_layers),
        _placement(the_plan),
        the_plan.settings.by_layer,
        events.stored,
    )
    for warning in _pageable(job.decoder):
        events.note(warning)
    evaluated = make_batches(data.eval, recipe)
    _prove_budget(job, the_plan, meter, evaluated)

    checkpoint_folder = folder.path / "checkpoints"
    state = resume(recipe, checkpoint_folder, job, events.note)
    scores = _Scores(job.decoder, evaluated, folder, state, events)
    if not scores.points:
        scores.add("before")
    every = recipe.save_every or max(1, job.course.steps // 10)
    saver = Checkpoints(
        checkpoint_folder, job.trainable, job.optimizer, every, recipe.keep_checkpoints, job.course.steps
    )
    with StopOnSignal(saver) as stop:
        events.training(state.step, job.course.steps)
        hooks = [*_watchers(recipe, folder, state, scores, events), saver, stop]
        before = _traffic(job.decoder)
        train(job.decoder, job.batches, job.optimizer, job.course, state, job.clock, hooks, meter.peak)
        after = _traffic(job.decoder)
        timeline = job.decoder.streamer.engine.timeline() if job.decoder.streamer else []
    save_and_reload(job, recipe, folder.path / "adapter", base.name)
    if len(scores.points) < 2 or scores.points[-1][0] < state.step:
        scores.add("after")
    stream = stream_figures(before, after, the_plan.settings.streamed, the_plan.resident_layers) if after else None
    return write_report(folder.path, recipe, the_plan, state, data.stats, scores.points, meter.peak(), stream, timeline)


class _Scores:
    """Losses on the evaluation set by step, noted in the run folder so that a resumed run keeps them."""

    def __init__(self, decoder: Decoder, batches: Batches, folder: RunFolder, state: TrainState, events: Events):
        self.decoder, self.batches, self.folder, self.state, self.events = decoder, batches, folder, state, events
        self.points = [(step, loss) for step, loss in folder.notes.get("evals", []) if step <= state.step]

    def add(self, when: str) -> None:
        """Evaluate now; does nothing when there is no evaluation set."""
        if not self.batches.per_epoch:
            return
        evaluation = evaluate_loss(self.decoder, self.batches)
        self.points.append((self.state.step, evaluation.loss))
        self.folder.note(evals=self.points)
        self.events.evaluated(when, evaluation)


def _watchers(recipe: Recipe, folder: RunFolder, state: TrainState, scores: _Scores, events: Events) -> list[Hook]:
    hooks: list[Hook] = [MetricsFile(folder.path / "metrics.jsonl", state.step), Listener(events.step)]
    if recipe.eval_every:
        hooks.append(EveryN(recipe.eval_every, lambda state: scores.add(f"step {state.step}")))
    if recipe.report_to != "none":
        hooks.append(Tracker(recipe.report_to, folder.path))
    return hooks


def _as_before(recipe: Recipe, folder: RunFolder) -> Recipe:
    """The recipe with the choices that the plan made when this run began: with other free memory it might now make
    others, and batches would change half-way.
    """
    if not checkpoints(folder.path / "checkpoints"):
        return recipe
    return make_recipe({**read_recipe_file(folder.path / "recipe.yaml"), **recipe.model_dump(include=RUNTIME_FIELDS)})


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


def _ready(recipe: Recipe, adapter: str | None) -> tuple[Base, Decoder, Recipe]:
    """A loaded model for evaluation or chat, within the budget, and the recipe with its open choices made."""
    bundle = read_adapter(adapter_folder(adapter)) if adapter else None
    base = find_base(recipe.model, recipe.weights)
    budget = find_budget(recipe)
    the_plan = make_plan(base.spec, recipe, budget)
    if not the_plan.fits:
        raise refusal(the_plan)
    _check_can_run(the_plan)
    base = base.to_stream() if the_plan.settings.streamed else base.fetched()
    recipe, device = resolve(recipe, the_plan), _device(budget)
    _cap(device, the_plan)
    decoder = load_model(base, recipe, device, placement=_placement(the_plan)).eval()
    if bundle:
        load_into(attach(decoder, bundle.config, Clock()), bundle, str(adapter))
    return base, decoder, recipe


def _check_starting_points(recipe: Recipe, base: Base) -> None:
    """An adapter or checkpoint to go on from is looked at before anything large is fetched."""
    if recipe.init_adapter:
        check_fits(base.spec, read_adapter(adapter_folder(recipe.init_adapter)))
    if recipe.resume not in ("auto", "never"):
        check_checkpoint(Path(recipe.resume))


def _check_can_run(the_plan: Plan) -> None:
    if the_plan.fit == "prune":
        raise InputError("The plan is --fit prune: Pruning is not in this version yet, though it can be planned.")


def _placement(the_plan: Plan) -> Placement | None:
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


def _device(budget: MemoryBudget) -> torch.device:
    """Where to compute.

    Raises:
        InputError: there is a card, and this torch cannot use it.
    """
    if budget.device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"There is a CUDA card, and torch {torch.__version__} cannot use it.",
            "It is a build for the CPU, or the driver is too old for it.",
            "Install the CUDA build of torch, or hide the card with CUDA_VISIBLE_DEVICES= to run on the CPU.",
        )
    return torch.device(budget.device)


def _cap(device: torch.device, the_plan: Plan) -> None:
    """Keep the allocator within the budget, on a card."""
    if device.type == "cuda":
        cap_memory(the_plan.budget_bytes, the_plan.overhead_bytes)


def _prove_budget(job: Job, the_plan: Plan, meter: Meter, evaluated: Batches) -> None:
    """A trial step and evaluation on the longest micro-batches, before training.

    Raises:
        OverBudget: they take more than the budget.
    """
    micro = [longest(job.batches)] * the_plan.settings.at_once
    last = longest(evaluated) if evaluated.per_epoch else None
    try:
        probe(job.decoder, micro, job.optimizer, job.clock, meter, the_plan.settings.by_layer, last)
    except torch.OutOfMemoryError:
        raise OverBudget(the_plan, None) from None
    if meter.peak() > the_plan.budget_bytes:
        raise OverBudget(the_plan, meter.peak())


def _leaner_plan(error: OverBudget, spec: ModelSpec, recipe: Recipe, budget: MemoryBudget) -> Plan | None:
    """A plan with room for what the trial took beyond the old one's prediction; None where there is no other."""
    room = budget.gpu_bytes - (error.measured_bytes - error.plan.peak_bytes)
    leaner = make_plan(spec, recipe, replace(budget, gpu_bytes=max(room, 1)))
    if not leaner.fits or leaner.settings == error.plan.settings:
        return None
    return replace(leaner, budget_bytes=budget.gpu_bytes)
