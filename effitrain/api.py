"""The verbs as functions: they take and return plain values and print nothing.

``run`` reads top to bottom: what is asked, whether it can be had, the plan, then the plan carried out.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from effitrain.adapters.attach import attach
from effitrain.adapters.base import AdapterConfig, Clock, adapter_class
from effitrain.adapters.merge import check_fits, merge
from effitrain.adapters.storage import adapter_folder, load_into, read_adapter, save_adapter
from effitrain.core.budget import MemoryBudget
from effitrain.core.choices import sequence_length
from effitrain.core.cut import small_spec
from effitrain.core.errors import BudgetError, InputError
from effitrain.core.plan import Plan, make_plan, refusal, resolve
from effitrain.core.recipe import RUNTIME_FIELDS, Recipe, make_recipe, read_recipe_file
from effitrain.core.report import Report
from effitrain.core.units import format_bytes
from effitrain.data.batches import longest
from effitrain.data.prepare import PreparedData, check_data, prepare_data
from effitrain.evals.chat import ChatSession
from effitrain.evals.perplexity import Evaluation, evaluate_loss
from effitrain.evals.recovered import compare, facts
from effitrain.evals.scores import Scores
from effitrain.io.atomic import remove_stale, write_json, write_text
from effitrain.io.checkpoint import open_checkpoint
from effitrain.io.hub import fetch_weights
from effitrain.io.keep import KEEP, read_keep, write_keep
from effitrain.io.machine import find_budget
from effitrain.io.run_folder import RunFolder, open_run
from effitrain.model.decoder import Decoder
from effitrain.model.load import Base, find_base, load_model
from effitrain.planning import plan, recipe
from effitrain.pruning.calibration import calibrate
from effitrain.pruning.loraprune import LoRAPrune
from effitrain.pruning.recover import recover_adapter
from effitrain.pruning.small import Small, make_small
from effitrain.report.files import write_report
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
    check_tracker,
)
from effitrain.train.job import Job, assemble, chosen, make_batches, resume, save_and_reload
from effitrain.train.loop import train
from effitrain.train.memory import Meter, cap_memory
from effitrain.train.probe import probe
from effitrain.train.state import TrainState, check_checkpoint, checkpoints

__all__ = ["Events", "chat", "evaluate", "export", "plan", "prune", "recipe", "recover", "run"]


class Events:
    """What ``run`` tells while it works; every method does nothing. The command line prints from here."""

    def note(self, text: str) -> None:
        """Something worth knowing."""

    def planned(self, plan: Plan) -> None:
        """The plan, before anything is loaded."""

    def loaded(self, part: str, layers: int) -> None:
        """A layer of ``layers`` is in place."""

    def data(self, data: PreparedData) -> None:
        """The data, with one masked sample."""

    def evaluated(self, when: str, evaluation: Evaluation) -> None:
        """A loss on the evaluation set: ``before``, ``after`` or ``step N``."""

    def training(self, done: int, steps: int) -> None:
        """Training begins, or goes on, at step ``done``."""

    def step(self, record: StepRecord) -> None:
        """A step is done."""


def run(recipe: Recipe, events: Events | None = None, dry_run: bool = False) -> Report | None:
    """Plan, load, train, evaluate, report. The run folder is the state: the same call goes on after a kill.

    Args:
        recipe: what to do.
        events: told of progress.
        dry_run: stop after the plan, and return None.

    Raises:
        InputError: something asked for is wrong or missing.
        BudgetError: nothing fits.
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
    events.planned(the_plan)
    if not the_plan.fits:
        raise refusal(the_plan)
    if dry_run:
        return None
    _check_can_run(the_plan, ("resident", "prune"))
    device, resolved = _device(budget), resolve(recipe, the_plan)
    known = folder.notes["recipes"] if folder.knows(asked) else []
    folder = folder.note(recipes=sorted({*known, asked.fingerprint(), resolved.fingerprint()}))
    write_text(folder.path / "recipe.yaml", resolved.to_yaml())
    write_json(folder.path / "plan.json", the_plan.to_json())
    try:
        return _carry_out(resolved, the_plan, device, folder, base, events)
    except torch.OutOfMemoryError:
        raise _over_budget("The run asked for more", the_plan) from None


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
    path = _new_folder(target)
    bundle = read_adapter(adapter_folder(adapter))
    base = find_base(recipe.model)
    check_fits(base.spec, bundle)
    if to == "merged":
        folder = fetch_weights(base.source)
        merge(folder, open_checkpoint(folder), bundle, path, progress=progress)
    else:
        save_adapter(path, bundle.tensors, bundle.config, base.name)
    return path


def prune(recipe: Recipe, tell: Callable[[str], None] = lambda text: None) -> Path:
    """Write a small model to ``recipe.output_dir``: pruned, aligned, ready to train on; returns the folder.

    Args:
        recipe: with ``fit="prune"`` and a ratio; calibrates on the training part of its data set.
        tell: told of progress.

    Raises:
        InputError: the model, the text or the folder cannot be used.
    """
    base, target = find_base(recipe.model), Path(recipe.output_dir)
    small_spec(base.spec, recipe)
    budget = find_budget(recipe)
    dtype = recipe.dtype if recipe.dtype != "auto" else budget.half if budget.device == "cuda" else "fp32"
    recipe = recipe.changed(dtype=dtype, max_seq_len=sequence_length(base.spec, recipe))
    base = base.fetched()
    remove_stale(target.parent, target.name)
    make_small(base, recipe, lambda: calibrate(recipe, base), _device(budget), target, tell)
    return target


def recover(adapter: str, keep: str, model: str, target: str) -> Path:
    """Turn an adapter of a small model into one of the full-size model, from files alone; returns its folder.

    Args:
        adapter: an adapter folder, or the run folder that holds it.
        keep: keep.safetensors, or the folder of the small model or run that holds it.
        model: the full-size model.
        target: the new folder.

    Raises:
        InputError: the three do not belong together, or the target exists.
    """
    path = _new_folder(target)
    recover_adapter(adapter_folder(adapter), read_keep(Path(keep)), find_base(model).fetched(), path)
    return path


def _carry_out(
    recipe: Recipe, the_plan: Plan, device: torch.device, folder: RunFolder, base: Base, events: Events
) -> Report:
    """Load, (prune), probe, train, (recover), save and report what the plan says."""
    remove_stale(folder.path)
    base = base.fetched()
    data = prepare_data(recipe, base.tokenizer(), chosen(recipe.max_seq_len))
    folder = _same_inputs(folder, data=data.fingerprint, model=base.weights().fingerprint())
    events.data(data)
    meter = Meter(device)
    _cap(device, the_plan)
    pruning = recipe.prune_method if the_plan.fit == "prune" else None
    small = _make_small(recipe, base, data, device, folder, events) if pruning == "loram" else None
    trained_on, adapter = (small.base, "adapter-small") if small else (base, "adapter")
    state, points = _train(recipe, the_plan, meter, folder, trained_on, data, events, adapter)
    pruned = None
    if small:
        bundle = recover_adapter(folder.path / adapter, small.keep, base, folder.path / "adapter")
        batches = make_batches(data.eval, recipe)
        pruned, points = compare(recipe, base, device, batches, bundle, points, events.evaluated)
    elif pruning:
        pruned = facts(recipe, points, [])
    return write_report(folder.path, recipe, the_plan, state, data.stats, points, meter.peak(), pruned)


def _train(
    recipe: Recipe, the_plan: Plan, meter: Meter, folder: RunFolder, base: Base, data: PreparedData, events: Events,
    adapter: str,
) -> tuple[TrainState, list[tuple[int, float]]]:  # fmt: skip
    """Train, and save the adapter or what LoRAPrune leaves; where that ended, and losses by step."""
    layers = base.spec.num_layers
    job = assemble(recipe, base, data.train, meter.device, lambda part: events.loaded(part, layers))
    pruner = None
    if the_plan.fit == "prune" and recipe.prune_method == "loraprune":
        pruner = LoRAPrune(job.decoder, job.adapters, small_spec(base.spec, recipe).widths, job.course.steps)
        job.trainable.update(pruner.state())
    _prove_budget(job, the_plan, meter)

    checkpoint_folder = folder.path / "checkpoints"
    state = resume(recipe, checkpoint_folder, job, events.note)
    scores = Scores(job.decoder, make_batches(data.eval, recipe), folder, state, events.evaluated)
    if not scores.points:
        scores.add("before")
    every = recipe.save_every or max(1, job.course.steps // 10)
    saver = Checkpoints(
        checkpoint_folder, job.trainable, job.optimizer, every, recipe.keep_checkpoints, job.course.steps
    )
    with StopOnSignal(saver) as stop:
        events.training(state.step, job.course.steps)
        hooks = [*_watchers(recipe, folder, state, scores, events), saver, stop]
        if pruner:
            hooks.insert(0, Calls(pruner.after_backward, pruner.after_step))
        train(job.decoder, job.batches, job.optimizer, job.course, state, job.clock, hooks, meter.peak)
    if pruner:
        pruner.write(base, AdapterConfig.of(recipe), folder.path / "model")
    else:
        save_and_reload(job, recipe, folder.path / adapter, base.name)
    if len(scores.points) < 2 or scores.points[-1][0] < state.step:
        scores.add("after")
    return state, scores.points


def _make_small(
    recipe: Recipe, base: Base, data: PreparedData, device: torch.device, folder: RunFolder, events: Events
) -> Small:
    """The small model of a run that prunes, in ``small/``, and its keep map beside it."""
    small = make_small(base, recipe, lambda: calibrate(recipe, base, data), device, folder.path / "small", events.note)
    write_keep(folder.path / KEEP, small.keep)
    return small


def _watchers(recipe: Recipe, folder: RunFolder, state: TrainState, scores: Scores, events: Events) -> list[Hook]:
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
    _check_can_run(the_plan, ("resident",))
    base, recipe, device = base.fetched(), resolve(recipe, the_plan), _device(budget)
    _cap(device, the_plan)
    decoder = load_model(base, recipe, device).eval()
    if bundle:
        load_into(attach(decoder, bundle.config, Clock()), bundle, str(adapter))
    return base, decoder, recipe


def _check_starting_points(recipe: Recipe, base: Base) -> None:
    """An adapter or checkpoint to go on from is looked at before anything large is fetched."""
    if recipe.init_adapter:
        spec = base.spec if recipe.prune_ratio is None else small_spec(base.spec, recipe)
        check_fits(spec, read_adapter(adapter_folder(recipe.init_adapter)))
    if recipe.resume not in ("auto", "never"):
        check_checkpoint(Path(recipe.resume))


def _check_can_run(the_plan: Plan, fits: tuple[str, ...]) -> None:
    if the_plan.fit not in fits or the_plan.settings.streamed:
        way = f"--fit {the_plan.fit}" + (" with streamed layers" if the_plan.settings.streamed else "")
        raise InputError(f"The plan is {way}: that is not in this version yet, though it can be planned.")


def _new_folder(target: str) -> Path:
    path = Path(target)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} exists already.", next_step="Name a new folder with -o.")
    return path


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


def _prove_budget(job: Job, the_plan: Plan, meter: Meter) -> None:
    """A trial step on the longest micro-batch, before training; stops the run when it takes more than the budget."""
    probe(job.decoder, longest(job.batches), job.optimizer, job.clock, meter)
    if meter.peak() > the_plan.budget_bytes:
        raise _over_budget(f"A trial step took {format_bytes(meter.peak())}", the_plan)


def _over_budget(fact: str, the_plan: Plan) -> BudgetError:
    return BudgetError(
        f"{fact}, and the budget is {format_bytes(the_plan.budget_bytes)}.",
        f"The plan expected {format_bytes(the_plan.peak_bytes)}.",
        "Try a smaller --batch-size or --max-seq-len, or --recompute layer.",
        plan=the_plan,
    )
