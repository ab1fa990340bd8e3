"""Shapes of known models, for tests of what follows from a configuration alone; found by pytest's ``pythonpath``."""

from typing import Any

from effitrain.core.presets import find_preset
from effitrain.core.spec import ModelSpec, spec_from_config


def config_of(name: str) -> dict[str, Any]:
    """The config.json of the preset ``name``."""
    found = find_preset(name)
    assert found is not None, f"there is no preset {name}"
    return dict(found.config)


def preset(name: str) -> ModelSpec:
    """The shape of the preset ``name``."""
    return spec_from_config(config_of(name), name)
