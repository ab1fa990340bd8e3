"""Where the stores of quantised models lie, from which commit of the hub they were built, and whether a disk has room.
Imports no torch.
"""

import json
import os
import shutil
from pathlib import Path

from effitrain.core.errors import InputError
from effitrain.core.units import format_bytes

SUFFIX = ".partial"  # of a store that is being built
ABOUT = "store.json"


def default_store_dir() -> Path:
    """``$XDG_CACHE_HOME/effitrain/stores``, under ``~/.cache`` where that is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "effitrain" / "stores"


def list_stores(root: Path) -> list[Path]:
    """The folders of stores below ``root``, unfinished ones with their suffix."""
    return sorted(path.parent for path in root.glob(f"[!.]*/{ABOUT}"))


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def check_space(folder: Path, what: str, needed: int, next_step: str) -> None:
    """Refuse to begin what the disk has no room for.

    Args:
        folder: there already.
        what: takes the room, as the beginning of a sentence.
        needed: bytes that are still to be written.
        next_step: of the error.

    Raises:
        InputError: less is free; says how much is missing.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        fact = f"{what} takes {format_bytes(needed)} more in {folder}, and {format_bytes(free)} are free there"
        raise InputError(f"{fact}: {format_bytes(needed - free)} are missing.", next_step=next_step)


def origin_of(folder: Path) -> str:
    """``owner/name@commit`` of a store made from the hub; empty for any other."""
    try:
        return str(json.loads((folder / ABOUT).read_text(encoding="utf-8"))["key"]["origin"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def pinned_commit(root: Path, hub_id: str) -> str | None:
    """The commit of ``hub_id`` that the newest store below ``root`` was built from, or is being built from.

    It is used again, so that a finished store needs no network, and a push to the hub makes no other one.
    """
    stores = sorted(list_stores(root), key=lambda folder: (folder / ABOUT).stat().st_mtime, reverse=True)
    origins = (origin_of(folder).rpartition("@") for folder in stores)
    return next((commit for name, _, commit in origins if name == hub_id), None)


def is_stored(root: Path, hub_id: str, commit: str | None) -> bool:
    """Whether there is a finished store of this commit, in whatever form."""
    finished = (folder for folder in list_stores(root) if not folder.name.endswith(SUFFIX))
    return any(origin_of(folder) == f"{hub_id}@{commit}" for folder in finished)
