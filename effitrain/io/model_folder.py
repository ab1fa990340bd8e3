"""A model folder as it lies on disk: its config.json and where in which safetensors file each tensor is.

Reads headers only, some kilobytes a file, and needs no torch.
"""

import json
import math
import shutil
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

from effitrain.core.errors import InputError
from effitrain.core.units import format_bytes

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_COMPANIONS = ("*.json", "*.model", "*.txt", "*.jinja")
_NEXT = "Name a folder that holds config.json and model.safetensors, or its shards with their index."
_AGAIN = "Get the file again."
_READABLE = "Check its permissions and the disk."
_MAX_HEADER = 100_000_000  # bytes, the limit of safetensors itself
_SHOWN = 16  # file names in a message


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: ``nbytes`` bytes from byte ``start``, in the safetensors dtype ``dtype`` ("BF16", ...)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_config(folder: Path) -> dict[str, Any]:
    """The content of ``folder``'s config.json.

    Raises:
        InputError: no such folder, or no readable config in it.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        what = f"{folder} is a file, not a model folder." if folder.exists() else f"There is no folder {folder}."
        raise InputError(what, next_step=_NEXT)
    if (folder / "adapter_config.json").is_file() and not path.is_file():
        raise InputError(f"{folder} holds an adapter, not a model.", next_step="Name its base model with --model.")
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model folder.

    Raises:
        InputError: missing, unreadable, or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing; {on_disk(path.parent)}", next_step=_NEXT) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.", next_step=_READABLE) from None
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}.", _guess(path), _AGAIN) from None
    if not isinstance(value, dict):
        raise InputError(f"{path} does not hold a JSON object.", _guess(path), _AGAIN)
    return value


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the model in ``folder`` by the name it is stored under.

    Raises:
        InputError: no safetensors, a missing shard, or a file that is cut off or something else.
    """
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    if (folder / INDEX).is_file():
        return _from_index(folder)
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        raise InputError(
            f"{folder} holds its weights as pickle ({_listing(pickles)}).",
            "Loading a pickle can run code that it brings, so it is not read.",
            "Get the safetensors version of the model, or save it again with save_pretrained of transformers.",
        )
    raise InputError(f"{folder} has neither {SINGLE} nor {INDEX}; {on_disk(folder)}", next_step=_NEXT)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file by name.

    Raises:
        InputError: not a safetensors file, or cut off.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, _MAX_HEADER):
                raise ValueError("it does not start with a safetensors header")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        tensors = {name: _stored(path, 8 + length, entry) for name, entry in header.items()}
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.", next_step=_READABLE) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error) if type(error) is ValueError else "its header is damaged"
        raise InputError(f"{path} is not a safetensors file: {reason}.", _guess(path), _AGAIN) from None
    end = max((tensor.start + tensor.nbytes for tensor in tensors.values()), default=8 + length)
    if end != size:
        raise InputError(
            f"{path} has {size} bytes ({format_bytes(size)}), and its header speaks of {end} ({format_bytes(end)}).",
            "The download was probably cut off." if size < end else "Something was written behind its end.",
            _AGAIN,
        )
    return tensors


def copy_companions(source: Path, target: Path) -> None:
    """Copy what a model folder holds beside its weights: config, tokenizer, chat template."""
    for pattern in _COMPANIONS:
        for path in source.glob(pattern):
            if not path.name.endswith(".index.json"):
                shutil.copyfile(path, target / path.name)


def on_disk(folder: Path) -> str:
    """What lies in ``folder``, as the end of a sentence."""
    return f"on disk: {_listing(sorted(path.name for path in folder.iterdir())) or 'nothing'}."


def _from_index(folder: Path) -> dict[str, StoredTensor]:
    files_of = read_json(folder / INDEX).get("weight_map")
    if not isinstance(files_of, dict) or not all(isinstance(file, str) for file in files_of.values()):
        raise InputError(f"{folder / INDEX} has no weight_map of tensors and files.", next_step=_AGAIN)
    files = sorted(set(files_of.values()))
    absent = [file for file in files if not (folder / file).is_file()]
    if absent:
        raise InputError(
            f"{len(absent)} of {len(files)} shards are missing in {folder}: {_listing(absent)}; {on_disk(folder)}",
            "The download was probably not finished.",
            "Get the missing files, into the same folder.",
        )
    headers = {file: read_header(folder / file) for file in files}
    lost = [name for name, file in files_of.items() if name not in headers[file]]
    if lost:
        raise InputError(
            f"{folder / INDEX} lists {len(lost)} tensors that are not in their files: {_listing(lost)}.",
            "Index and shards are of different models or versions.",
            "Get index and shards again, from one place.",
        )
    return {name: headers[file][name] for name, file in files_of.items()}


def _stored(path: Path, data: int, entry: dict[str, Any]) -> StoredTensor:
    start, end = map(index, entry["data_offsets"])
    shape = tuple(map(index, entry["shape"]))
    if start < 0 or end < start or (math.prod(shape) == 0) != (start == end):
        raise ValueError("its header is damaged")
    return StoredTensor(path, str(entry["dtype"]), shape, data + start, end - start)


def _guess(path: Path) -> str:
    """What the file at ``path`` really is, when its first bytes say so."""
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return "It is a Git LFS pointer: the clone was made without git lfs."
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "It is a web page, saved in the place of the file."
    if start.startswith((b"\x80", b"PK\x03\x04")):
        return "It is a pickle under another name."
    return "The file is empty." if not start else "The download was probably cut off or damaged."


def _listing(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
