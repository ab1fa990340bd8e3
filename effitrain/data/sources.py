"""Where rows come from: json, jsonl, csv, parquet and txt files, a folder of them, a hub id, the built-in set."""

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from effitrain.core.errors import InputError
from effitrain.data.hub import hub_rows

_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".parquet", ".txt")
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(:[\w.-]+)?$")


@dataclass(frozen=True)
class Row:
    """One row: its columns, and where it stands, for messages (``my.jsonl row 3``)."""

    fields: dict[str, Any]
    where: str


@dataclass(frozen=True)
class Source:
    """A data set that can be read.

    Attributes:
        name: as the user named it.
        digest: sha256 of the content.
        running_text: rows are whole ``.txt`` files, to be cut into pieces.
        load: reads every row; raises InputError with the line or row that is wrong.
    """

    name: str
    digest: str
    running_text: bool
    load: Callable[[], list[Row]]


def open_source(name: str | None) -> Source:
    """The data set called ``name``; None is the built-in one.

    Args:
        name: a file, a folder, or a hub id: ``owner/name`` or ``owner/name:configuration``.

    Raises:
        InputError: there is no such thing, or it is of a kind that cannot be read.
    """
    if name is None:
        return _open_files("built-in", [Path(str(resources.files("effitrain.presets") / "tiny_data" / "train.jsonl"))])
    path = Path(name).expanduser()
    if name and path.exists():
        return _open_files(name, _files_of(path) if path.is_dir() else [path])
    if path.suffix in _SUFFIXES or not _HUB_ID.match(name) or name.startswith("."):
        raise InputError(
            f"There is no file or folder {name}.",
            next_step="Check the path. A data set of the hub is named owner/name.",
        )
    return _open_hub(name)


def _files_of(folder: Path) -> list[Path]:
    found = (path for path in folder.rglob("*") if path.suffix in _SUFFIXES)
    files = sorted(path for path in found if not any(p.startswith(".") for p in path.relative_to(folder).parts))
    if not files:
        raise InputError(f"The folder {folder} holds no data file.", next_step=f"It should hold {_kinds()} files.")
    return files


def _open_files(name: str, files: list[Path]) -> Source:
    unknown = [path.name for path in files if path.suffix not in _SUFFIXES]
    if unknown:
        raise InputError(f"{unknown[0]} is not a data file that can be read.", next_step=f"Give a {_kinds()} file.")
    texts = {path.suffix == ".txt" for path in files}
    if len(texts) > 1:
        raise InputError(f"The folder {name} mixes running text (.txt) and rows.", next_step="Name one of its files.")
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.suffix.encode() + hashlib.sha256(_bytes(path)).digest())
    return Source(name, digest.hexdigest(), texts.pop(), lambda: [row for path in files for row in _read(path)])


def _open_hub(name: str) -> Source:
    content = hub_rows(name)
    digest = hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()
    rows = [Row(fields, f"{name} row {number}") for number, fields in enumerate(content, 1)]
    return Source(name, digest, False, lambda: rows)


def _read(path: Path) -> Iterator[Row]:
    """Rows of one file, each an object of columns."""
    for number, fields in _READERS[path.suffix](path):
        where = f"{path.name} row {number}"
        if not isinstance(fields, dict):
            raise InputError(
                f"{where} is not an object with columns but a {type(fields).__name__}.",
                next_step='Every row should look like {"prompt": "...", "completion": "..."}.',
            )
        yield Row(fields, where)


def _read_text(path: Path) -> Iterator[tuple[int, Any]]:
    text = _decoded(path)
    if text.strip():
        yield 1, {"text": text}


def _read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(_decoded(path).split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise InputError(
                    f"{path.name}: broken JSON at line {number}: {error}.",
                    next_step="Mend that line; every line should hold one object.",
                ) from None


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    text = _decoded(path)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            yield from _read_lines(path)  # JSON lines under the wrong suffix are common
            return
        raise InputError(
            f"{path.name}: broken JSON at line {error.lineno}: {error}.",
            next_step="Mend it there; a file with one object a line is named .jsonl.",
        ) from None
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    if not isinstance(content, list):
        raise InputError(
            f"{path.name} holds no list of rows but a {type(content).__name__}.",
            next_step='It should look like [{...}, {...}] or {"data": [{...}, {...}]}.',
        )
    yield from enumerate(content, 1)


def _read_csv(path: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(io.StringIO(_decoded(path), newline=""), strict=True)
    try:
        for number, fields in enumerate(reader, 1):
            if None in fields:
                raise InputError(
                    f"{path.name} row {number} has more cells than the header has columns.",
                    "A comma inside a text needs quotes around the text.",
                    "Mend the row.",
                )
            yield number, fields
    except csv.Error as error:
        raise InputError(
            f"{path.name}: broken CSV at line {reader.reader.line_num}: {error}.", next_step="Mend that line."
        ) from None


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        yield from enumerate(parquet.read_table(path).to_pylist(), 1)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(
            f"{path.name} is not a readable parquet file: {error}", next_step="Get or write the file again."
        ) from None


_READERS: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
    ".json": _read_json,
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.", next_step="Check its permissions.") from None


def _decoded(path: Path) -> str:
    try:
        return _bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path.name} is not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}.",
            next_step="Convert it, for instance with iconv -t UTF-8.",
        ) from None


def _kinds() -> str:
    return ", ".join(_SUFFIXES)
