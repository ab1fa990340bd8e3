"""Where the stores of quantised models lie, and from which commit of the hub they were built. Imports no torch."""

import json
import os
from pathlib import Path

SUFFIX = ".partial"  # of a store that is being built
ABOUT = "store.json"


def default_store_dir() -> Path:
    """``$XDG_CACHE_HOME/effitrain/stores``, under ``~/.cache`` where that is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "effitrain" / "stores"


def list_stores(root: Path) -> list[Path]:
    """The folders of stores below ``root``, unfinished ones with their suffix."""
    return sorted(path.parent for path in root.glob(f"[!.]*/{ABOUT}"))


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
