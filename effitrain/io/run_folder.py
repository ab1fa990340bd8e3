"""The run folder is the state of a run: what was asked, what is done, what may be gone on with."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from effitrain.core.errors import InputError
from effitrain.core.names import flag_of
from effitrain.core.positions import same_positions
from effitrain.core.recipe import Recipe
from effitrain.io.atomic import write_json
from effitrain.io.keep import KEEP
from effitrain.io.model_folder import read_config

_OURS = (
    *("report.json", "report.html", "loss.png", "recipe.yaml", "plan.json", "metrics.jsonl", "checkpoints"),
    *("adapter", "adapter-small", KEEP, "small", "small-align", "model", "model-nf4", "config.json"),
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
        """Whether the report, the last thing a run writes, is there, and what the run was for."""
        made = (self.path / name for name in ("adapter/adapter_model.safetensors", "model/config.json"))
        return (self.path / "report.json").is_file() and any(path.is_file() for path in made)

    @property
    def started(self) -> bool:
        """Whether a run of this recipe was here before."""
        return bool(self.notes)

    def knows(self, recipe: Recipe) -> bool:
        """Whether ``recipe`` is the one that was asked for here, or what the plan made of it."""
        return recipe.result_fields() in self._known

    def differences(self, recipe: Recipe) -> list[str]:
        """What ``recipe`` asks for otherwise than the nearest one known here, as ``--seed 42 -> 3``."""
        asked = recipe.result_fields()
        known = [{key: (old.get(key), new) for key, new in asked.items() if old.get(key) != new} for old in self._known]
        changed = min(known, key=len, default={})
        return [f"{flag_of(key)} {_shown(old)} -> {_shown(new)}" for key, (old, new) in changed.items()]

    @property
    def _known(self) -> list[dict[str, Any]]:
        return list(self.notes.get("recipes", []))

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
    try:
        TemporaryFile(dir=there).close()  # permissions alone do not tell: root may write anywhere, and yet not in /proc
    except OSError as error:
        reason = f"cannot be written: {error.strerror}" if there.is_dir() else "is a file"
        raise InputError(f"The output folder {path} cannot be made: {there} {reason}.", next_step=_ANOTHER) from None
    folder = RunFolder(path, _read_notes(path / "run.json"))
    foreign = [name for name in _OURS if (path / name).exists()]
    if not folder.started and foreign:
        raise InputError(f"{path} holds {foreign[0]}, which no run of effitrain left there.", next_step=_ANOTHER)
    trained = folder.finished or any((path / "checkpoints").glob("step-*"))
    if trained and not folder.knows(recipe):
        trains_on = f" To train on from its adapter, add --init-adapter {path}." if (path / "adapter").is_dir() else ""
        raise InputError(
            f"{path} holds the run of another recipe: {', '.join(folder.differences(recipe))}.",
            f"What it trains is in {path / 'recipe.yaml'}.",
            f"{_ANOTHER}{trains_on}",
        )
    return folder


def _shown(value: Any) -> str:
    """A field as the command line writes it."""
    if value is None:
        return "auto"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list | dict):
        pairs = value.items() if isinstance(value, dict) else []
        return ",".join([f"{name}={column}" for name, column in pairs] or map(str, value))
    return str(value)


def positions_beside(adapter: str) -> dict[str, Any] | None:
    """The config.json with scaled positions that an adapter was trained with: in its own folder or in that of its run,
    whichever is named; None where positions are the model's own.
    """
    for folder in (Path(adapter), Path(adapter).parent):
        whose = any((folder / name).is_file() for name in ("run.json", "adapter_config.json"))
        if whose and (folder / "config.json").is_file():
            return read_config(folder)
    return None


def positions_of_small(adapter: str, keep: str) -> dict[str, Any] | None:
    """The config.json with the positions that the adapter of a small model was trained with: what lies beside it, else
    that of the small model, beside its keep map ``keep``; None where they are the full-size model's own.
    """
    beside, folder = positions_beside(adapter), Path(keep) if Path(keep).is_dir() else Path(keep).parent
    of_pruning_run = (Path(adapter).parent / KEEP).is_file()  # which has the positions that it gave the full-size model
    if beside or of_pruning_run or not (folder / "config.json").is_file():
        return beside
    return read_config(folder)


def check_positions(adapter: str, config: Mapping[str, Any]) -> None:
    """Refuse to go on from an adapter that was trained with scaled positions other than those of ``config``.

    Raises:
        InputError: they differ.
    """
    positions = positions_beside(adapter)
    if positions and not same_positions(positions, config):
        raise InputError(
            f"{adapter} was trained with other positions than this run has.",
            next_step="Repeat its --max-seq-len, --rope-scaling and --rope-factor.",
        )


def _read_notes(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} cannot be read: {error}", next_step=_ANOTHER) from None
