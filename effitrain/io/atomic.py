"""Files and folders that are there whole or not at all, whenever the process or the machine stops.

Everything is written beside its target under a hidden name, flushed to the disk and renamed. What a killed process
leaves is hidden, and ``remove_stale`` clears it.
"""

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from errno import EDQUOT, EFBIG, ENOSPC
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effitrain.core.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


class Unwritable(InputError):
    """A place cannot be written, or the disk is full."""


_REPLACED = ".replaced"
_LEFT_OVER = re.compile(r"\..+\.(tmp|removed)-[0-9a-f]{8}")
_DISK_FULL = (ENOSPC, EDQUOT, EFBIG)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` in UTF-8, replacing what was there.

    Raises:
        InputError: the place cannot be written.
    """
    with replacing(path) as tmp:
        tmp.write_text(text, encoding="utf-8")


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``, replacing what was there.

    Raises:
        InputError: the place cannot be written.
    """
    with replacing(path) as tmp:
        tmp.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` to ``path`` as indented JSON.

    Raises:
        InputError: the place cannot be written.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_safetensors(path: Path, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str]) -> None:
    """Write contiguous host tensors to ``path`` as one safetensors file.

    Raises:
        InputError: the place cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path) as tmp:
        try:
            save_file(dict(tensors), tmp, dict(metadata))
        except SafetensorError as error:
            raise _unwritable(path, str(error)) from None
        tmp.chmod(tmp.parent.stat().st_mode & 0o666)  # save_file makes files that only their owner can read


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill; it becomes ``path``, replacing what was there, when the block ends without an error.

    Raises:
        InputError: the place cannot be written, or the disk is full.
    """
    tmp = _neighbour(path)
    try:
        yield tmp
        _sync_tree(tmp)
        _put(tmp, path)
    except Unwritable as error:
        raise _renamed(error, tmp, path) from None
    except OSError as error:
        if error.errno in _DISK_FULL or str(error.filename).startswith((str(tmp), str(path))):
            raise _unwritable(path, error.strerror) from None
        raise
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write a file under, in a hidden folder; the file becomes ``path`` when the block ends.

    Raises:
        InputError: the place cannot be written, or the disk is full.
    """
    folder = _neighbour(path)
    tmp = folder / path.name
    try:
        yield tmp
        _sync(tmp)
        os.replace(tmp, path)
        _sync(path.parent)
    except OSError as error:
        raise _unwritable(path, error.strerror) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder at once: a kill while its files go leaves none of it under its name."""
    doomed = path.with_name(f".{path.name}.removed-{secrets.token_hex(4)}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def remove_stale(parent: Path, name: str | None = None) -> None:
    """Clear what killed writers left in ``parent``; a folder caught between its two names gets its own back.

    No other process may be writing there, or, with ``name``, the folder of that name.
    """
    for entry in parent.glob(f".{escape(name)}.*" if name else ".*"):
        target = entry.with_name(entry.name[1:].removesuffix(_REPLACED))
        replaced = entry.name.endswith(_REPLACED)
        if replaced and not target.exists():
            entry.rename(target)
        elif replaced or _LEFT_OVER.fullmatch(entry.name):
            shutil.rmtree(entry)


def _neighbour(path: Path) -> Path:
    """A new hidden folder beside ``path``."""
    folder = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise _unwritable(path, error.strerror) from None
    return folder


def _put(tmp: Path, path: Path) -> None:
    # A rename cannot replace a folder that is not empty, so the old one steps aside; remove_stale knows its name.
    old = path.with_name(f".{path.name}{_REPLACED}")
    try:
        if path.is_dir():
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        tmp.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    for entry in folder.rglob("*"):
        _sync(entry)
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _renamed(error: Unwritable, tmp: Path, path: Path) -> Unwritable:
    """``error`` of a file within ``tmp``, by the name that it would have had: nobody knows the hidden one."""
    return Unwritable(error.fact.replace(str(tmp), str(path)), next_step=error.next_step)


def _unwritable(path: Path, reason: str | None) -> Unwritable:
    return Unwritable(
        f"{path} cannot be written: {reason}.",
        next_step="Check free space and permissions there, or name another output folder with -o.",
    )
