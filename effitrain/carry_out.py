"""A plan carried out: load, prune, probe, train, recover, save and report.

``api.run`` decides what is done; here it happens, in the order in which it is read.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from effitrain.adapters.variants import code_of
from effitrain.core.budget import MemoryBudget
from effitrain.core.cut import alignment_recipe
from effitrain.core.disk import output_bytes
from effitrain.core.errors import BudgetError, InputError
from effitrain.core.methods import SAMPLED
from effitrain.core.plan import Plan, make_plan, resolve
from effitrain.core.recipe import Recipe
from effitrain.core.report import Report
from effitrain.core.units import counted, format_bytes, format_duration
from effitrain.data.batches import Batches
from effitrain.data.prepare import PreparedData, prepare_data
from effitrain.evals.events import Events
from effitrain.evals.recovered import compare, facts
from effitrain.evals.walked import ends
from effitrain.io.atomic import remove_stale, write_json
from effitrain.io.keep import KEEP, write_keep
from effitrain.io.run_folder import LARGE, RunFolder, open_run
from effitrain.io.stores import check_space, folder_bytes
from effitrain.model.load import Base, find_base
from effitrain.pruning.calibration import calibrate
from effitrain.pruning.recover import recover_adapter
from effitrain.pruning.small import Small, Training, make_small
from effitrain.report.files import rope_figures, write_report
from effitrain.train.job import chosen, make_batches, make_course
from effitrain.train.loop import Course
from effitrain.train.memory import Meter
from effitrain.train.probe import OverBudget
from effitrain.train.state import checkpoints
from effitrain.training import cap, train_model


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
        folder = folder.note(evals=[], positions=[], answers=[])  # of a run of another recipe that never took a step
    folder = _same_inputs(folder, data=data.fingerprint, model=base.fingerprint(), **code_of(recipe.method))
    events.data(data)
    if recipe.eval_fraction and not recipe.eval_dataset and not len(data.eval):
        events.note(_no_evaluation(recipe, data))
    batches = make_batches(data.train, recipe)
    course = make_course(recipe, batches, the_plan.settings.at_once)
    events.note(_ahead(course, data, batches, the_plan))
    _check_disk(recipe, folder, the_plan, base, course.steps)
    device = torch.device(budget.device)
    meter = Meter(device)
    cap(device, the_plan)
    small = _make_small(recipe, base, data, budget, folder, events) if pruning == "loram" else None
    trained_on, adapter = (small.base.at_positions(base.source.config), "adapter-small") if small else (base, "adapter")
    if small:
        events.note("Training on the small model: losses by step are its own.")
    run = train_model(recipe, the_plan, budget, meter, folder, trained_on, data, events, adapter)
    if small:
        bundle = recover_adapter(folder.path / adapter, small.keep, base, folder.path / "adapter")
        batches = make_batches(data.eval, recipe)
        pruned, points = compare(recipe, base, device, batches, bundle, run.evals, events.evaluated)
        run = replace(run, prune=pruned, evals=points, positions=None)  # of the full-size model alone
    elif pruning:
        run = replace(run, prune=facts(recipe, run.evals, []))
    elif recipe.method == "lisa" and recipe.quant != "none":  # trained beside layers in 4 bits, which the model is not
        whole = find_base(str(folder.path / "model"))
        events.note("The model that is saved has no layer in NF4. Its losses are those of the report:")
        batches = make_batches(data.eval, recipe)
        run = replace(run, evals=ends(recipe, base, whole, device, batches, run.evals, events.evaluated))
    rope = rope_figures(recipe, base.spec, base.source.loads_from, folder.path)
    return write_report(folder.path, replace(run, peak_bytes=meter.peak(), rope=rope))


def _no_evaluation(recipe: Recipe, data: PreparedData) -> str:
    share = f"--eval-fraction {recipe.eval_fraction:g} of {counted(data.stats.samples, 'sample')}"
    return f"No sample is kept for evaluation: {share} is none. Name other data with --eval-dataset."


def _ahead(course: Course, data: PreparedData, batches: Batches, the_plan: Plan) -> str:
    """How long the run is; in hours too on a card, whose speed the plan estimates."""
    tokens = round(data.train.lengths.sum() * course.micro_batches / batches.per_epoch)
    text = f"Training: {counted(course.steps, 'step')}, about {tokens:,} tokens"
    if not the_plan.overhead_bytes:
        return f"{text}."
    speed = the_plan.tokens_per_second_estimate
    return f"{text}: {format_duration(tokens / speed)} at {speed:,.0f} tokens/s, as the plan estimates."


def _check_disk(recipe: Recipe, folder: RunFolder, the_plan: Plan, base: Base, steps: int) -> None:
    """Refuse a run whose checkpoints and results the disk has no room for, before the model is loaded.

    Raises:
        InputError: they take more than is free.
    """
    there = sum(folder_bytes(folder.path / name) for name in LARGE)
    needed = output_bytes(base.spec, recipe, the_plan, steps) - there
    fewer = output_bytes(base.spec, recipe.model_copy(update={"keep_checkpoints": 1}), the_plan, steps) - there
    another = "name an output folder on a larger disk with -o."
    leaner = f"Keep fewer with --keep-checkpoints 1, which takes {format_bytes(fewer)}, or {another}"
    step = leaner if fewer < needed else another.capitalize()
    check_space(folder.path, "What the run saves", needed, step)


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
            tell(f"Aligned: evaluation loss {before:.4f} before, {after:.4f} after {counted(report.steps, 'step')}.")
        return out / "model", {"steps": report.steps, "before": before, "after": after}

    return train_all


def _too_large_to_train(the_plan: Plan, fact: str) -> BudgetError:
    return BudgetError(
        f"--align train trains every weight of the small model. {fact}",
        "It keeps master weights, gradients and moments in float32.",
        "Use --align lsq, which has one layer in memory, or a larger --prune-ratio.",
        the_plan,
    )


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
