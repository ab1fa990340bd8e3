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
from effitrain.core.disk import bytes_to_come
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
from effitrain.io.disk import check_space, folder_bytes, free_bytes
from effitrain.io.keep import KEEP, write_keep
from effitrain.io.run_folder import RunFolder, open_run
from effitrain.model.load import Base, find_base
from effitrain.pruning.calibration import calibrate
from effitrain.pruning.recover import recover_adapter
from effitrain.pruning.small import Small, Training, make_small
from effitrain.report.files import rope_figures, write_report
from effitrain.train.job import chosen, make_batches, make_course, resumed_from
from effitrain.train.memory import Meter
from effitrain.train.probe import OverBudget
from effitrain.train.state import checkpoints, step_of
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
    base, data, folder = _inputs(recipe, folder, the_plan, base, events)
    batches = make_batches(data.train, recipe)
    _look_ahead(recipe, folder, the_plan, base, batches, events)
    device = torch.device(budget.device)
    meter = Meter(device)
    cap(device, the_plan)
    small = _make_small(recipe, base, data, budget, folder, events) if pruning == "loram" else None
    trained_on, adapter = (small.base.at_positions(base.source.config), "adapter-small") if small else (base, "adapter")
    if small:
        events.note("Training on the small model: losses by step are its own.")
    run = train_model(recipe, the_plan, budget, meter, folder, trained_on, data, batches, events, adapter)
    if small:
        bundle = recover_adapter(folder.path / adapter, small.keep, base, folder.path / "adapter")
        batches = make_batches(data.eval, recipe)
        pruned, points = compare(recipe, base, device, batches, bundle, run.evals, events.evaluated)
        if recipe.small_model:  # what it lacks was decided when it was made
            pruned["parts"] = small.keep.parts
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


def _inputs(
    recipe: Recipe, folder: RunFolder, the_plan: Plan, base: Base, events: Events
) -> tuple[Base, PreparedData, RunFolder]:
    """The model on this disk, the data made for it, and the folder that knows both."""
    pruned = the_plan.fit == "prune"
    store_is_enough = the_plan.settings.streamed and not pruned and recipe.method not in SAMPLED
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
        events.note(
            f"No sample is kept for evaluation: --eval-fraction {recipe.eval_fraction:g} of so few rows is none. Name"
            " other data with --eval-dataset."
        )
    return base, data, folder


def _look_ahead(
    recipe: Recipe, folder: RunFolder, the_plan: Plan, base: Base, batches: Batches, events: Events
) -> None:
    """Tell how long the run is, in hours too on a card, whose speed the plan estimates; refuse it where the disk has no
    room for what it saves. Nothing is loaded yet.

    Raises:
        InputError: it takes more than is free.
    """
    course = make_course(recipe, batches, the_plan.settings.at_once)
    held, begun = checkpoints(folder.path / "checkpoints"), resumed_from(recipe, folder.path / "checkpoints")
    done = step_of(begun) if begun else 0
    if (left := course.steps - done) > 0:
        micro_batches = course.micro_batches - done * course.grad_accum
        tokens = round(batches.token_set.lengths.sum() * micro_batches / batches.per_epoch)
        text = f"Training: {counted(left, 'more step' if done else 'step')}, about {tokens:,} tokens"
        if the_plan.overhead_bytes:
            speed = the_plan.tokens_per_second_estimate
            text += f": {format_duration(tokens / speed)} at {speed:,.0f} tokens/s, as the plan estimates"
        events.note(f"{text}.")
    small_is_there, aligned = (folder.path / "small").exists(), folder_bytes(folder.path / "small-align")
    needed, fewer = (
        bytes_to_come(base.spec, kept, the_plan, course.steps, done, len(held), small_is_there) - aligned
        for kept in (recipe, recipe.changed(keep_checkpoints=1))
    )
    elsewhere = "name an output folder on a larger disk with -o."
    step = elsewhere.capitalize()
    if fewer < needed and fewer <= free_bytes(folder.path):
        step = f"Keep fewer with --keep-checkpoints 1, which takes {format_bytes(fewer)}, or {elsewhere}"
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
