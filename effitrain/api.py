"""The verbs as functions: they take and return plain values and print nothing.

``run`` reads top to bottom: what is asked, whether it can be had, the plan, then the plan carried out.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from effitrain.adapters.full import check_kept
from effitrain.adapters.merge import check_fits, merge
from effitrain.adapters.portable import check_alive, for_peft_alone, one_rank
from effitrain.adapters.storage import adapter_folder, read_adapter, save_adapter
from effitrain.adapters.variants import check_method
from effitrain.carry_out import aligning_run, carry_out
from effitrain.core.budget import MemoryBudget, card_bytes
from effitrain.core.choices import compute_dtype, sequence_length
from effitrain.core.cut import small_spec
from effitrain.core.errors import InputError
from effitrain.core.methods import CHANGES_MODEL
from effitrain.core.plan import Plan, make_plan, refusal, resolve
from effitrain.core.positions import with_positions_of
from effitrain.core.recipe import RUNTIME_FIELDS, Recipe, make_recipe, read_recipe_file
from effitrain.core.report import Report
from effitrain.core.spec import ModelSpec, spec_from_config
from effitrain.core.system import check_alone
from effitrain.data.prepare import check_data, prepare_data
from effitrain.evals.chat import ChatSession
from effitrain.evals.events import Events
from effitrain.evals.passkey import passkey as find_passkeys
from effitrain.evals.positions import score
from effitrain.io.atomic import remove_stale, write_json, write_text
from effitrain.io.checkpoint import open_checkpoint
from effitrain.io.hub import fetch_weights, find_model
from effitrain.io.keep import read_keep
from effitrain.io.machine import find_budget
from effitrain.io.model_folder import read_config
from effitrain.io.run_folder import RunFolder, check_positions, open_run, positions_beside, positions_of_small
from effitrain.model.load import Base, find_base
from effitrain.planning import at_positions, explained, plan, recipe
from effitrain.pruning.calibration import calibrate
from effitrain.pruning.recover import recover_adapter
from effitrain.pruning.small import make_small
from effitrain.ready import Ready, load_ready
from effitrain.train.hooks import check_tracker
from effitrain.train.job import make_batches
from effitrain.train.memory import device_of, measured
from effitrain.train.probe import OverBudget
from effitrain.train.proof import proved
from effitrain.train.state import check_checkpoint, checkpoints

__all__ = ["Events", "chat", "evaluate", "export", "plan", "prove", "prune", "recipe", "recover", "run"]


def prove(recipe: Recipe) -> Plan:
    """The plan of ``recipe`` with its ``proof``: the real training step run on shapes alone, every tensor counted."""
    made = plan(recipe)
    recipe, config = at_positions(recipe, find_model(recipe.model).config)
    spec = spec_from_config(config, recipe.model)
    return proved(made, spec, config, recipe, "cuda" if made.overhead_bytes else "cpu")


def run(recipe: Recipe, events: Events | None = None, dry_run: bool = False, prove_plan: bool = False) -> Report | None:
    """Plan, load, train, evaluate, report. The run folder is the state: the same call goes on after a kill.

    Here it is decided what is done; ``carry_out.py`` does it, and each step is taken by ``train`` in ``train/loop.py``.

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
    if not dry_run:
        check_alone()
    folder = _run_folder(recipe)
    if folder.finished and not dry_run:
        events.note(f"{folder.path} holds this run, finished. Nothing to do.")
        return Report.read(folder.path / "report.json")
    check_method(recipe.method)
    check_tracker(recipe.report_to)
    if recipe.gpu and not dry_run:
        card_bytes(recipe.gpu)  # names the known ones where this is none
        raise InputError("--gpu plans for a card that is not here.", next_step="Use `effitrain plan`, or --dry-run.")
    if recipe.dataset is None:
        events.note("No --dataset: training on the built-in instruction set.")
    check_data(recipe)
    base = find_base(recipe.model, recipe.weights)
    if base.source.folder:
        base.tokenizer()  # told before the plan when it cannot be used
    asked = recipe
    recipe, config = at_positions(_as_before(asked, folder), base.source.config)
    base = base.at_positions(config)
    _check_starting_points(recipe, base)
    budget = measured(find_budget(recipe))
    the_plan = explained(make_plan(base.spec, recipe, budget), base.source, recipe)
    if prove_plan and the_plan.fits:
        the_plan = proved(the_plan, base.spec, base.source.config, recipe, budget.device)
    events.planned(the_plan)
    if not the_plan.fits:
        raise refusal(the_plan)
    if dry_run:
        return None
    device_of(budget)
    try:
        resolved, begun = _begin(folder, asked, recipe, the_plan)
        return carry_out(resolved, begun, the_plan, budget, base, events)
    except OverBudget as error:
        leaner = _leaner_plan(error, base.spec, recipe, budget)
        if leaner is None:
            raise
        events.note(f"{error.fact} Planning anew with less.")
    gc.collect()  # the model of the first try must be gone before the second is loaded
    events.planned(leaner)
    resolved, begun = _begin(folder, asked, recipe, leaner)
    return carry_out(resolved, begun, leaner, budget, base, events)


def evaluate(
    recipe: Recipe, adapter: str | None = None, by_position: int | Literal["auto"] | None = None,
    passkey: Sequence[int] = (),
) -> dict[str, Any]:  # fmt: skip
    """Loss and perplexity of a model on a data set: ``{"loss", "perplexity", "tokens", "model", "adapter"}``.

    With ``by_position`` also ``"by_position"``, the loss in buckets of so many tokens; with samples longer than the
    model was made for that too, and ``"warnings"``. With ``passkey`` also ``"passkey"``, and without a data set that
    alone.

    Args:
        recipe: model and data.
        adapter: an adapter folder, or a run folder that holds one.
        by_position: tokens of a bucket.
        passkey: lengths of prompts, in tokens, in which a number is hidden.
    """
    recipe = recipe.changed(eval_fraction=0.0, eval_dataset=None)
    scores_text = recipe.dataset is not None or not passkey
    if scores_text:
        check_data(recipe)
    ready = load_ready(recipe, adapter, "score", passkey)
    scores = _score(ready, sequence_length(ready.base.spec, recipe), by_position) if scores_text else {}
    scores |= {"model": recipe.model, "adapter": adapter}
    if passkey:
        found = find_passkeys(ready.decoder, ready.base.tokenizer(), passkey, ready.texts_at_once, recipe.seed)
        scores["passkey"] = [asdict(one) for one in found]
    return scores


def chat(recipe: Recipe, adapter: str | None = None) -> ChatSession:
    """Load a model, with or without an adapter, to talk to: ``chat(recipe).answer(messages)`` yields text.

    The recipe's ``max_seq_len`` bounds a conversation, its ``batch_size`` is how many are answered together.
    """
    ready = load_ready(recipe, adapter, "chat")
    settings = ready.plan.settings
    length = min(settings.max_seq_len, ready.base.spec.max_positions)
    session = (ready.decoder, ready.base.tokenizer(), recipe.template, recipe.seed)
    return ChatSession(*session, length, settings.at_once)


def export(
    recipe: Recipe, adapter: str, target: str, to: str = "peft",
    progress: Callable[[str], None] = lambda name: None, tell: Callable[[str], None] = lambda text: None,
) -> Path:  # fmt: skip
    """Write an adapter to a new folder, in the form that all its readers agree on, or merged into the full-precision
    model.

    Args:
        recipe: names the model.
        adapter: an adapter folder, or a run folder that holds one.
        target: the new folder.
        to: ``peft`` (one rank, alpha the same, the scale in B: for peft, vLLM and llama.cpp) or ``merged`` (bf16 shards
            whatever the model is stored in, one tensor in memory at a time).
        progress: told the name of each tensor merged.
        tell: told what other programs than peft cannot take from the adapter.

    Raises:
        InputError: the target exists, or adapter and model do not belong together.
    """
    bundle = read_adapter(adapter_folder(adapter))
    base = find_base(recipe.model)
    check_fits(base.spec, bundle)
    path = _new_folder(target)
    positions = positions_beside(adapter)
    if to == "merged":
        folder = fetch_weights(base.source)
        config = read_config(folder)
        config = with_positions_of(positions, config) if positions else config
        merge(folder, open_checkpoint(folder), bundle, path, config, progress=progress)
    else:
        form, factors = one_rank(bundle.tensors, lambda path, rank: bundle.config.scaling)
        save_adapter(path, factors, form, base.name, full=bundle.full, positions=positions)
        for part in for_peft_alone(bundle.full, positions):
            tell(part)
    return path


def prune(recipe: Recipe, tell: Callable[[str], None] = lambda text: None) -> Path:
    """Write a small model to ``recipe.output_dir``: pruned, aligned, ready to train on; returns the folder.

    Args:
        recipe: with ``fit="prune"`` and a ratio; calibrates on the training part of its data set.
        tell: told of progress.

    Raises:
        InputError: the model, the text or the folder cannot be used.
    """
    check_alone()
    base, target = find_base(recipe.model), Path(recipe.output_dir)
    recipe, config = at_positions(recipe, base.source.config)
    base = base.at_positions(config)
    small_spec(base.spec, recipe)
    budget = find_budget(recipe)
    recipe = recipe.changed(dtype=compute_dtype(recipe, budget), max_seq_len=sequence_length(base.spec, recipe))
    base = base.fetched()
    remove_stale(target.parent, target.name)
    train_all = aligning_run(recipe, budget, tell)
    make_small(base, recipe, lambda: calibrate(recipe, base), device_of(budget), target, tell, train_all)
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
    folder, kept, base = adapter_folder(adapter, "adapter-small"), read_keep(Path(keep)), find_base(model)
    read_adapter(folder)  # told before a model is downloaded
    path = _new_folder(target)
    recover_adapter(folder, kept, base.fetched(), path, positions_of_small(str(folder), keep))
    return path


def _run_folder(recipe: Recipe) -> RunFolder:
    """The output folder. A mistyped name of data or model makes another recipe, and is told before that."""
    try:
        return open_run(recipe)
    except InputError:
        check_data(recipe)
        find_model(recipe.model)
        raise


def _begin(folder: RunFolder, asked: Recipe, recipe: Recipe, the_plan: Plan) -> tuple[Recipe, RunFolder]:
    """Write down what is about to be done; the recipe with every choice made, and the folder that knows it."""
    resolved = resolve(recipe, the_plan)
    recipes = list(folder.notes["recipes"]) if folder.knows(asked) else []
    recipes += [new for new in (asked.result_fields(), resolved.result_fields()) if new not in recipes]
    folder = folder.note(recipes=recipes)
    write_text(folder.path / "recipe.yaml", resolved.to_yaml())
    write_json(folder.path / "plan.json", the_plan.to_json())
    return resolved, folder


def _as_before(recipe: Recipe, folder: RunFolder) -> Recipe:
    """The recipe with the choices that the plan made when this run began: with other free memory it might now make
    others, and batches would change half-way.
    """
    if not checkpoints(folder.path / "checkpoints"):
        return recipe
    return make_recipe({**read_recipe_file(folder.path / "recipe.yaml"), **recipe.model_dump(include=RUNTIME_FIELDS)})


def _score(ready: Ready, length: int, by_position: int | Literal["auto"] | None) -> dict[str, Any]:
    """Losses on the data set, in samples of ``length`` tokens at most."""
    recipe = ready.recipe.changed(max_seq_len=length)
    batches = make_batches(prepare_data(recipe, ready.base.tokenizer(), length).train, recipe)
    found = score(ready.decoder, batches, ready.plan.settings.at_once, by_position)
    whole = found.evaluation
    scores: dict[str, Any] = {"loss": whole.loss, "perplexity": whole.perplexity, "tokens": whole.tokens}
    if found.buckets:
        scores["by_position"] = [asdict(one) for one in found.buckets]
    if found.warning:
        scores["warnings"] = [found.warning]
    return scores


def _check_starting_points(recipe: Recipe, base: Base) -> None:
    """What a run goes on from, adapter, checkpoint or small model, is looked at before anything large is fetched."""
    if recipe.method in CHANGES_MODEL and "quantization_config" in base.source.config:
        raise InputError(
            f"{base.name} is stored in 4 bits, and --method {recipe.method} trains weights of full precision.",
            next_step="Name the original 16-bit model with --model.",
        )
    if recipe.small_model:
        read_keep(Path(recipe.small_model))
    if recipe.init_adapter:
        bundle = read_adapter(adapter_folder(recipe.init_adapter))
        if recipe.prune_ranking == "local":  # else the scores decide what fits
            prunes = recipe.prune_ratio is not None or recipe.small_model
            check_fits(small_spec(base.spec, recipe) if prunes else base.spec, bundle)
        check_kept(bundle.full, recipe)
        check_alive(bundle.tensors, recipe.init_adapter)
        check_positions(recipe.init_adapter, base.source.config)
    if recipe.resume not in ("auto", "never"):
        check_checkpoint(Path(recipe.resume))


def _new_folder(target: str) -> Path:
    path = Path(target)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} exists already.", next_step="Name a new folder with -o.")
    return path


def _leaner_plan(error: OverBudget, spec: ModelSpec, recipe: Recipe, budget: MemoryBudget) -> Plan | None:
    """A plan with room for what the trial took beyond the old one's prediction; None where there is no other."""
    room = budget.gpu_bytes - (error.measured_bytes - error.plan.peak_bytes)
    leaner = make_plan(spec, recipe, replace(budget, gpu_bytes=max(room, 1)))
    if not leaner.fits or leaner.settings == error.plan.settings:
        return None
    return replace(leaner, budget_bytes=budget.gpu_bytes)
