"""The part of the API that answers without torch: what is asked for, and what would fit."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from effitrain.core.memory import nf4_bytes
from effitrain.core.methods import METHODS, SAMPLED
from effitrain.core.names import flag_of
from effitrain.core.plan import ModelFigures, Plan, make_plan
from effitrain.core.positions import scaled_config, settled
from effitrain.core.presets import find_preset
from effitrain.core.recipe import Recipe, make_recipe
from effitrain.core.spec import spec_from_config
from effitrain.core.units import format_bytes
from effitrain.io.hub import ModelSource, find_model
from effitrain.io.machine import find_budget
from effitrain.io.stores import default_store_dir, is_stored


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
    source = find_model(recipe.model)
    recipe, config = at_positions(recipe, source.config)
    spec = spec_from_config(config, recipe.model)
    named = recipe.gpu is not None or recipe.gpu_mem is not None
    return explained(make_plan(spec, recipe, find_budget(recipe, assume_card=named)), source, recipe)


def explained(plan: Plan, source: ModelSource, recipe: Recipe) -> Plan:
    """``plan`` with reasons that lie in where the model comes from: what is downloaded, and what its preset brings."""
    if not plan.fits:
        return plan
    return replace(plan, reasons=(*plan.reasons, *_download(plan, source, recipe), *_defaults(source, recipe)))


def _download(plan: Plan, source: ModelSource, recipe: Recipe) -> Iterator[str]:
    streams = plan.fit == "stream" and recipe.method not in SAMPLED  # from the store alone
    stored = streams and is_stored(default_store_dir(), source.hub_id, source.revision)
    if not (source.folder or recipe.weights or stored):
        where = "for that store, file by file, and no file is kept" if streams else "to it"
        size = format_bytes(_stored_bytes(plan.model, source.config))
        yield f"Unless the hub's cache holds them, {size} of weights are downloaded {where}."


def _defaults(source: ModelSource, recipe: Recipe) -> Iterator[str]:
    defaults = dict(source.preset.defaults) if source.preset else {}
    if recipe.max_steps:
        defaults.pop("epochs", None)
    taken = [f"{flag_of(name)} {value:g}" for name, value in defaults.items() if getattr(recipe, name) == value]
    if taken:
        yield f"The preset {source.name} brings {' and '.join(taken)}."


def _stored_bytes(model: ModelFigures, config: Mapping[str, Any]) -> int:
    """Bytes of the weights in their files, as config.json says they are stored: in 16 bits where it does not say."""
    width = 4 if (config.get("dtype") or config.get("torch_dtype")) == "float32" else 2
    if "quantization_config" not in config:
        return width * model.params
    return nf4_bytes(model.linear_params) + width * (model.params - model.linear_params)


def at_positions(recipe: Recipe, config: Mapping[str, Any]) -> tuple[Recipe, dict[str, Any]]:
    """``recipe`` with its choice of scaled positions made, and the model's config.json with them.

    Raises:
        InputError: the model has positions of its own that would be replaced, or the factor does not reach.
    """
    recipe = settled(recipe, config, recipe.model)
    return recipe, scaled_config(config, recipe)
