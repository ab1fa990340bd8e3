"""Positions beyond those a model was made for: its config.json with rotary scaling, as transformers 4 and 5 read it."""

import math
from collections.abc import Mapping
from typing import Any

from effitrain.core.errors import InputError
from effitrain.core.recipe import Recipe
from effitrain.core.spec import spec_from_config

# The keys that transformers 4 wrote and 5 still reads; what 5 writes is read and turned into them.
_SCALING, _THETA, _BOTH = "rope_scaling", "rope_theta", "rope_parameters"
_LENGTH = "max_position_embeddings"


def settled(recipe: Recipe, config: Mapping[str, Any], name: str) -> Recipe:
    """``recipe`` with the choice of scaling and its factor made for the model of ``config``.

    Left open, positions are scaled when ``--max-seq-len`` or ``--rope-factor`` ask for more of them than there are:
    divided by the smallest whole factor that reaches (position interpolation, Chen et al. 2023, as LongLoRA does).

    Raises:
        InputError: the model has a scaling of its own that another would replace, nothing would be scaled, the factor
            does not reach, or the config is of no model that can be handled.
    """
    known, wanted = spec_from_config(config, name).max_positions, recipe.max_seq_len or 0
    kind, factor = recipe.rope_scaling, recipe.rope_factor
    if kind == "auto":
        kind = "linear" if wanted > known or factor is not None else "none"
    if kind == "none":
        return recipe.changed(rope_scaling="none", rope_factor=None)
    factor = float(max(1, math.ceil(wanted / known))) if factor is None else factor
    own = own_scaling(config)
    if own is not None and (own, kind) != ("linear", "linear"):
        raise InputError(
            f"{name} has {own} positions of its own, {known:,} of them, and --rope-scaling {kind} would replace them.",
            f"--max-seq-len {wanted} asks for more." if wanted > known else "",
            f"--max-seq-len of at most {known}, or --rope-scaling none to go past them unscaled.",
        )
    if factor == 1:
        raise InputError(
            f"--rope-scaling {kind} would change nothing: {name} has {known:,} positions, and --max-seq-len asks for no"
            " more.",
            next_step=f"Say how far they are to reach, such as --rope-factor 2 or --max-seq-len {2 * known}, or leave"
            " --rope-scaling out.",
        )
    if wanted > known * factor:
        raise InputError(
            f"--rope-factor {factor:g} reaches {int(known * factor):,} positions, and --max-seq-len is {wanted:,}.",
            next_step=f"--rope-factor {math.ceil(wanted / known)}, or leave it out.",
        )
    return recipe.changed(rope_scaling=kind, rope_factor=factor)


def scaled_config(config: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """``config`` with the positions that ``recipe``, settled, asks for; a copy of it where it asks for none.

    ``linear`` divides positions by the factor, times that of a model already scaled so. ``ntk`` raises the base to
    ``theta * factor ** (d / (d - 2))``, so that the lowest frequency is divided by the factor and the highest is not.
    ``yarn`` (Peng et al. 2023) divides low frequencies, keeps high ones and sharpens attention.
    """
    if recipe.rope_scaling in ("auto", "none") or recipe.rope_factor is None:
        return dict(config)
    known, factor, theta = int(config[_LENGTH]), recipe.rope_factor, _theta(config)
    scaling: dict[str, Any] | None = None
    if recipe.rope_scaling == "ntk":
        d = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        theta *= factor ** (d / (d - 2))
    elif recipe.rope_scaling == "yarn":
        scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": known}
    else:
        before = float(_own(config).get("factor", 1.0))
        scaling = {"rope_type": "linear", "factor": before * factor}
    kept = {key: value for key, value in config.items() if key != _BOTH}
    return {**kept, _LENGTH: int(known * factor), _THETA: theta, _SCALING: scaling}


def with_positions_of(positions: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with length, base and scaling of the config.json ``positions``."""
    keys = (_LENGTH, _THETA, _SCALING, _BOTH)
    kept = {key: value for key, value in config.items() if key not in keys}
    return {**kept, **{key: positions[key] for key in keys if key in positions}}


def same_positions(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two config.json give tokens the same positions, however they are written."""
    return position_facts(one) == position_facts(other)


def position_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """All that gives a model its positions, as JSON holds it, the same however a config.json writes it."""
    scaling = {key: value for key, value in _own(config).items() if key not in (_THETA, "type", "rope_type")}
    return {"length": config[_LENGTH], "theta": _theta(config), "kind": own_scaling(config), "scaling": scaling}


def without_scaling(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with plain rotary positions."""
    return {key: value for key, value in config.items() if key not in (_SCALING, _BOTH)}


def scaled_already(config: Mapping[str, Any], recipe: Recipe) -> bool:
    """Whether a model is one that a run of ``recipe`` left, with its positions scaled as the recipe says."""
    if recipe.rope_scaling == "ntk":  # shows in the base alone
        return (recipe.max_seq_len or 0) <= int(config[_LENGTH])
    return own_scaling(config) == recipe.rope_scaling


def own_scaling(config: Mapping[str, Any]) -> str | None:
    """The kind of scaling that a model brings, such as ``llama3``; None for plain rotary positions."""
    kind = str(_own(config).get("rope_type", _own(config).get("type", "default")))
    return None if kind == "default" else kind


def _own(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get(_SCALING) or config.get(_BOTH) or {}


def _theta(config: Mapping[str, Any]) -> float:
    """Its base; 10,000 where a config leaves it out, as transformers has it."""
    return float(_own(config).get(_THETA) or config.get(_THETA) or 10_000.0)
