"""The part of the API that answers without torch: what is asked for, and what would fit."""

from typing import Any

from effitrain.core.methods import METHODS
from effitrain.core.plan import Plan, make_plan
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
        from effitrain.adapters.base import check_method

        check_method(recipe.method)
    spec = spec_from_config(find_model(recipe.model).config, recipe.model)
    named = recipe.gpu is not None or recipe.gpu_mem is not None
    return make_plan(spec, recipe, find_budget(recipe, assume_card=named))
