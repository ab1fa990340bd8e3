"""The part of the API that answers without torch: what is asked for, and what would fit."""

from collections.abc import Mapping
from typing import Any

from effitrain.core.methods import METHODS
from effitrain.core.plan import Plan, make_plan
from effitrain.core.positions import scaled_config, settled
from effitrain.core.presets import find_preset
from effitrain.core.recipe import Recipe, make_recipe
from effitrain.core.spec import spec_from_config
from effitrain.io.hub import find_model
from effitrain.io.machine import find_budget


def recipe(**fields: Any) -> Recipe:
    """A checked recipe; a preset's own defaults fill what ``fields`` leave out.

    Raises:
        InputError: names every bad field at once.
    """
    preset = find_preset(str(fields.get("model", "tiny")))
    return make_recipe({**(preset.defaults if preset else {}), **fields})


def plan(recipe: Recipe) -> Plan:
    """What fits, from the configuration alone: neither weights nor a card are needed.

    Where no card is found, a recipe that names a card or its memory is planned for CUDA all the same.

    Raises:
        InputError: no such model, method, card or linear.
    """
    if recipe.method not in ("lora", *METHODS):  # looking others up imports torch
        from effitrain.adapters.variants import check_method

        check_method(recipe.method)
    recipe, config = at_positions(recipe, find_model(recipe.model).config)
    spec = spec_from_config(config, recipe.model)
    named = recipe.gpu is not None or recipe.gpu_mem is not None
    return make_plan(spec, recipe, find_budget(recipe, assume_card=named))


def at_positions(recipe: Recipe, config: Mapping[str, Any]) -> tuple[Recipe, dict[str, Any]]:
    """``recipe`` with its choice of scaled positions made, and the model's config.json with them.

    Raises:
        InputError: the model has positions of its own that would be replaced, or the factor does not reach.
    """
    recipe = settled(recipe, config, recipe.model)
    return recipe, scaled_config(config, recipe)
