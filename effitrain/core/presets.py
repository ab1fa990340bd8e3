"""Known models by short name: ``presets/*.toml``, each a hub id and the whole transformers config."""

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent.parent / "presets"


@dataclass(frozen=True)
class Preset:
    """A model known by name. ``config`` is a full config.json; ``folder`` holds the weights of a built-in model.

    ``defaults`` are recipe fields that suit the model where the user names none.
    ``gated``: the hub asks for a login and an accepted licence before it hands out the weights.
    """

    name: str
    aliases: tuple[str, ...]
    hub_id: str | None
    gated: bool
    folder: Path | None
    config: Mapping[str, Any]
    defaults: Mapping[str, Any]


def find_preset(name: str) -> Preset | None:
    """The preset of this name or alias, in any case; None when there is none."""
    wanted = name.lower()
    return next((preset for preset in _presets() if wanted in (preset.name, *preset.aliases)), None)


def preset_names() -> list[str]:
    """Every name and alias, sorted."""
    return sorted(name for preset in _presets() for name in (preset.name, *preset.aliases))


def _presets() -> Iterator[Preset]:
    # Read anew at every call, some milliseconds: configs are dicts, and no caller shares one with another.
    return (_read(path) for path in sorted(_FOLDER.glob("*.toml")))


def _read(path: Path) -> Preset:
    fields = tomllib.loads(path.read_text(encoding="utf-8"))
    return Preset(
        name=fields["name"],
        aliases=tuple(fields.get("aliases", ())),
        hub_id=fields.get("hub_id"),
        gated=fields.get("gated", False),
        folder=path.parent / fields["folder"] if "folder" in fields else None,
        config=fields["config"],
        defaults=fields.get("recipe", {}),
    )
