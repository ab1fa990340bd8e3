"""The run folder is the state of a run: what was asked, what is done, what may be gone on with."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effitrain.core.errors import InputError
from effitrain.core.recipe import Recipe
from effitrain.io.atomic import write_json

_OURS = (
    *("report.json", "recipe.yaml", "plan.json", "metrics.jsonl", "checkpoints", "adapter"),
    *("keep.safetensors", "small", "adapter-small"),
)
_ANOTHER = "Name another output folder with -o."


@dataclass(frozen=True)
class RunFolder:
    """An output folder that belongs to one recipe.

    Attributes:
        path: the folder.
        notes: what stages left for later ones (``run.json``); {} for a new run.
    """

    path: Path
    notes: dict[str, Any]

    @property
    def finished(self) -> bool:
        """Whether the report, the last thing a run writes, is there."""
        return (self.path / "report.json").is_file()

    @property
    def started(self) -> bool:
        """Whether a run of this recipe was here before."""
        return bool(self.notes)

    def knows(self, recipe: Recipe) -> bool:
        """Whether ``recipe`` is the one that was asked for here, or what the plan made of it."""
        return recipe.fingerprint() in self.notes.get("recipes", [])

    def note(self, **values: Any) -> "RunFolder":
        """Write ``values`` into run.json beside what it holds."""
        notes = {**self.notes, **values}
        write_json(self.path / "run.json", notes)
        return RunFolder(self.path, notes)


def open_run(recipe: Recipe) -> RunFolder:
    """The output folder of ``recipe``; nothing is written before the first note.

    Raises:
        InputError: it cannot be written, or holds the run of another recipe, or files that a run would replace.
    """
    path = Path(recipe.output_dir)
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        reason = "cannot be written" if there.is_dir() else "is a file"
        raise InputError(f"The output folder {path} cannot be made: {there} {reason}.", next_step=_ANOTHER)
    folder = RunFolder(path, _read_notes(path / "run.json"))
    foreign = [name for name in _OURS if (path / name).exists()]
    if not folder.started and foreign:
        raise InputError(f"{path} holds {foreign[0]}, which no run of effitrain left there.", next_step=_ANOTHER)
    trained = folder.finished or any((path / "checkpoints").glob("step-*"))
    if trained and not folder.knows(recipe):
        raise InputError(
            f"{path} holds the run of another recipe.",
            f"What it trains is in {path / 'recipe.yaml'}.",
            "Name another output folder with -o, or remove this one.",
        )
    return folder


def _read_notes(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} cannot be read: {error}", next_step=_ANOTHER) from None
