"""A model made ready for evaluation or chat: found, planned within the budget, loaded, its adapter put on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from effitrain.adapters.attach import attach
from effitrain.adapters.base import Clock
from effitrain.adapters.full import load_in_full
from effitrain.adapters.merge import check_fits
from effitrain.adapters.storage import AdapterBundle, adapter_folder, load_into, read_adapter
from effitrain.core.budget import MemoryBudget
from effitrain.core.choices import sequence_length
from effitrain.core.errors import InputError
from effitrain.core.generation import texts_at_once
from effitrain.core.ledger import Work
from effitrain.core.plan import Plan, make_plan, refusal, resolve
from effitrain.core.positions import scaled_already
from effitrain.core.recipe import Recipe
from effitrain.evals.passkey import check_lengths
from effitrain.io.machine import find_budget
from effitrain.io.run_folder import positions_beside
from effitrain.model.decoder import Decoder
from effitrain.model.load import Base, find_base, load_model
from effitrain.planning import at_positions
from effitrain.train.job import tile_of
from effitrain.train.memory import device_of, measured
from effitrain.training import cap, placement_of

# What a recipe says of training alone: eval and chat leave it aside.
_OF_TRAINING = ("method", "attention", "s2_group", "train_norms", "train_embeddings", *Recipe.fields_in("lisa"))


@dataclass(frozen=True)
class Ready:
    """A loaded model for evaluation or chat, within the budget, and the recipe with its open choices made."""

    base: Base
    decoder: Decoder
    recipe: Recipe
    plan: Plan
    budget: MemoryBudget

    def texts_at_once(self, tokens: int) -> int:
        """How many texts of ``tokens`` may be generated together.

        Raises:
            InputError: not even one has room.
        """
        count = texts_at_once(self.base.spec, self.recipe, self.plan.settings, self.budget, tokens)
        if not count:
            raise InputError(
                f"The keys and values of {tokens} tokens have no room beside the model.",
                next_step="Name smaller lengths, a larger --gpu-mem, or fewer layers with --resident-layers.",
            )
        return count


def load_ready(recipe: Recipe, adapter: str | None, work: Work, lengths: Sequence[int] = ()) -> Ready:
    """Load a model, planned for its data and for prompts of ``lengths`` tokens.

    Args:
        recipe: model and data; what it says of training is left aside.
        adapter: an adapter folder, or a run folder that holds one.
        work: what for.
        lengths: of prompts, in tokens.

    Raises:
        InputError: model and adapter do not belong together, or lengths are beyond the model's.
        BudgetError: nothing fits.
    """
    bundle = read_adapter(adapter_folder(adapter)) if adapter else None
    base = _as_trained(find_base(recipe.model, recipe.weights), recipe, adapter)
    if bundle:
        check_fits(base.spec, bundle)
    recipe = recipe.changed(**{field: Recipe.model_fields[field].default for field in _OF_TRAINING})
    check_lengths(base.spec, lengths)
    length = max(sequence_length(base.spec, recipe), *lengths, 0)
    recipe = recipe.changed(max_seq_len=length, **_adapter_fields(bundle))
    budget = measured(find_budget(recipe))
    the_plan = make_plan(base.spec, recipe, budget, work)
    if not the_plan.fits:
        raise refusal(the_plan)
    base = base.to_stream() if the_plan.settings.streamed else base.fetched()
    recipe, device = resolve(recipe, the_plan), device_of(budget)
    cap(device, the_plan)
    decoder = load_model(base, recipe, device, placement=placement_of(the_plan)).eval()
    decoder.set_tile(tile_of(recipe))
    if bundle:
        load_into(attach(decoder, bundle.config, Clock()), bundle, str(adapter))
        load_in_full(decoder, bundle.full)
    return Ready(base, decoder, recipe, the_plan, budget)


def _adapter_fields(bundle: AdapterBundle | None) -> dict[str, Any]:
    """The fields of a recipe that say how large an adapter is."""
    if bundle is None:
        return {"method": "lora", "lora_targets": ()}
    leaves = {path.rpartition(".")[2] for path in bundle.tensors}
    return {"method": "lora", "lora_r": bundle.config.r, "lora_targets": tuple(sorted(leaves))}


def _as_trained(base: Base, recipe: Recipe, adapter: str | None) -> Base:
    """``base`` with the positions that the adapter was trained with, else those that ``recipe`` names: a model is never
    stretched unasked, nor twice.
    """
    positions = positions_beside(adapter) if adapter else None
    if positions is None and recipe.rope_scaling != "auto" and not scaled_already(base.source.config, recipe):
        positions = at_positions(recipe, base.source.config)[1]
    return base.at_positions(positions) if positions else base
