"""Room on a disk. Imports no torch."""

import shutil
from pathlib import Path

from effitrain.core.errors import InputError
from effitrain.core.units import format_bytes


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def free_bytes(folder: Path) -> int:
    """What the disk of a folder, which is there already, has room for."""
    return shutil.disk_usage(folder).free


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
    free = free_bytes(folder)
    if needed > free:
        fact = f"{what} takes {format_bytes(needed)} more in {folder}, and {format_bytes(free)} are free there"
        raise InputError(f"{fact}: {format_bytes(needed - free)} are missing.", next_step=next_step)
