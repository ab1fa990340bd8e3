"""A folder's manifest: size and SHA-256 of every file, so that damage is found before it is used."""

import hashlib
import json
from pathlib import Path

from effitrain.core.errors import InputError
from effitrain.io.atomic import write_json

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Write ``manifest.json`` with every file below ``folder``."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    entries = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)} for path in files
    }
    write_json(folder / MANIFEST, {"files": entries})


def verify_manifest(folder: Path) -> None:
    """Compare every file that the manifest of ``folder`` lists; files it does not list are no concern.

    Raises:
        InputError: there is no readable manifest, or a file is missing or changed; the first one is named.
    """
    for name, size, digest in _entries(folder):
        path = folder / name
        if not path.is_file():
            raise _damaged(folder, f"{name} is missing")
        if path.stat().st_size != size:
            raise _damaged(folder, f"{name} has {path.stat().st_size} bytes instead of {size}")
        if _sha256(path) != digest:
            raise _damaged(folder, f"{name} has changed since it was written")


def _entries(folder: Path) -> list[tuple[str, int, str]]:
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return [(name, entry["size"], entry["sha256"]) for name, entry in files.items()]
    except FileNotFoundError:
        raise _damaged(folder, f"{MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise _damaged(folder, f"{MANIFEST} cannot be read") from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damaged(folder: Path, what: str) -> InputError:
    return InputError(
        f"{folder} is damaged: {what}.",
        "It was changed by hand or copied in part.",
        "Copy it again, or remove the folder and let it be made anew.",
    )
