"""A quantised model on disk: a blob for each decoder layer and one file for all else. Built once, then read in place.

A store is a folder: ``store.json`` (from which checkpoint, in which form, how blobs are laid out), for each layer
``layers/007.bin`` (the blob) and ``layers/007.safetensors`` (norms and biases), ``embedding.safetensors``,
``head.safetensors`` (with the last norm), and ``manifest.json`` (sizes and SHA-256). All but the blobs is as the
checkpoint has it. While it is built it has the suffix ``.partial``, and what lies there is whole: building goes on.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from effitrain.core.errors import InputError
from effitrain.core.layout import NF4, Field, Layout, Part
from effitrain.core.paths import path_of
from effitrain.io.atomic import Unwritable, remove_folder, remove_stale, write_json
from effitrain.io.checkpoint import read_tensor
from effitrain.io.disk import check_space, folder_bytes
from effitrain.io.manifest import verify_manifest, write_manifest
from effitrain.io.model_folder import StoredTensor, read_header
from effitrain.io.nf4 import NF4Tensor
from effitrain.io.stores import ABOUT, SUFFIX

VERSION = 1  # raise it when the same checkpoint would give other bytes
EMBEDDING_FILE, HEAD_FILE = Path("embedding.safetensors"), Path("head.safetensors")
_SAFE = {"uint8": "U8", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # names of dtypes in safetensors


@dataclass(frozen=True)
class StoreKey:
    """What decides the bytes of a store.

    Attributes:
        name: of the model, for people.
        source: fingerprint of the checkpoint.
        quant: ``nf4`` or ``none``.
        dtype: in which weights are quantised, or stored when they are not: ``bf16``, ``fp16`` or ``fp32``.
        device: that quantises, ``cpu`` or ``cuda``: the two round some weights differently.
        origin: ``owner/name@commit`` of a checkpoint that is on the hub alone, for people.
    """

    name: str
    source: str
    quant: str
    dtype: str
    device: str = "cpu"
    origin: str = ""

    @property
    def folder(self) -> str:
        """Name of the store's folder."""
        digest = hashlib.sha256(f"{VERSION} {self.source} {self.quant} {self.dtype} {self.device}".encode()).hexdigest()
        readable = "".join(c if c.isalnum() or c in ".-" else "-" for c in Path(self.name).name)
        return f"{readable}-{self.quant}-{self.dtype}-{digest[:12]}"


@dataclass(frozen=True)
class Store:
    """A finished store, under the protocols of a checkpoint and of a source of layers.

    Attributes:
        folder: where it lies.
        key: what it was made from.
        layouts: of every layer.
    """

    trusted: ClassVar = True  # looked through while it was built

    folder: Path
    key: StoreKey
    layouts: tuple[Layout, ...]

    def layout(self, layer: int) -> Layout:
        """How the bytes of ``layer`` are laid out."""
        return self.layouts[layer]

    def read_into(self, layer: int, target: Tensor) -> None:
        """Write the bytes of ``layer`` into the host tensor ``target`` [layout.nbytes] uint8.

        Raises:
            InputError: the file is gone or cut off.
        """
        place, done = target.numpy().data, 0
        with self._whole(), _readable(layer_path(self.folder, layer), self.folder) as handle:
            while done < len(place):
                got = os.preadv(handle, [place[done:]], done)
                if not got:
                    short = f"{layer_path(self.folder, layer)} ended {len(place) - done} bytes early"
                    raise InputError(f"Layer {layer} cannot be read: {short}.", next_step=_remedy(self.folder))
                done += got

    def read_ahead(self, layer: int) -> None:
        """Have the system read ``layer`` into its cache meanwhile."""
        with self._whole(), _readable(layer_path(self.folder, layer), self.folder) as handle:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_WILLNEED)

    def has(self, name: str) -> bool:
        """Whether there is such a weight."""
        return name in self._fields or name in self._tables

    def is_nf4(self, name: str) -> bool:
        """Whether the weight is stored in NF4."""
        return name in self._fields and self._fields[name][1].form == NF4

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """One plain weight on ``device``."""
        if name in self._fields:
            layer, field = self._fields[name]
            return self._part(layer, field.parts[0]).to(device)
        with self._whole():
            return read_tensor(name, self._tables[name]).to(device)

    def read_nf4(self, name: str, device: torch.device | str = "cpu") -> NF4Tensor:
        """One weight stored in NF4 on ``device``."""
        layer, field = self._fields[name]
        packed, absmax, nested_absmax, offset = (self._part(layer, part) for part in field.parts)
        return NF4Tensor(packed, absmax, nested_absmax, offset, field.shape).to(device)

    def fingerprint(self) -> str:
        """That of the checkpoint."""
        return self.key.source

    def _part(self, layer: int, part: Part) -> Tensor:
        stored = StoredTensor(layer_path(self.folder, layer), _SAFE[part.dtype], part.shape, part.start, part.nbytes)
        with self._whole():
            return read_tensor(part.dtype, stored)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """What cannot be read within is damage of this store, with its own way out."""
        try:
            yield
        except InputError as error:
            known = f"The store {self.folder.name} is damaged."
            fact = error.fact if error.fact.startswith(known) else f"{known} {error.fact}"
            raise InputError(fact, next_step=_remedy(self.folder)) from None

    @cached_property
    def _fields(self) -> Mapping[str, tuple[int, Field]]:
        return {
            path_of(layer, field.name, "weight"): (layer, field)
            for layer, layout in enumerate(self.layouts)
            for field in layout.fields
        }

    @cached_property
    def _tables(self) -> Mapping[str, StoredTensor]:
        files = [EMBEDDING_FILE, HEAD_FILE, *(small_path(layer) for layer in range(len(self.layouts)))]
        with self._whole():
            return {name: stored for file in files for name, stored in read_header(self.folder / file).items()}


def layer_path(folder: Path, layer: int) -> Path:
    """The blob of one layer."""
    return folder / "layers" / f"{layer:03d}.bin"


def small_path(layer: int) -> Path:
    """The norms and biases of one layer, within a store."""
    return Path("layers") / f"{layer:03d}.safetensors"


def open_store(folder: Path) -> Store:
    """The finished store in ``folder``; looks at names and sizes only.

    Raises:
        InputError: it is not one, of another version, or files are missing or cut off.
    """
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        if about["version"] != VERSION:
            raise _unusable(folder, f"it is of version {about['version']}, this one reads {VERSION}")
        kinds = [_layout_from(entry) for entry in about["layouts"]]
        store = Store(folder, StoreKey(**about["key"]), tuple(kinds[kind] for kind in about["layers"]))
    except FileNotFoundError:
        raise _unusable(folder, f"it has no {ABOUT}") from None
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        raise _unusable(folder, f"its {ABOUT} cannot be read") from None
    for layer, layout in enumerate(store.layouts):
        path = layer_path(folder, layer)
        if not path.is_file() or path.stat().st_size != layout.nbytes:
            raise _unusable(folder, f"layer {layer} ({path.name}) is missing or cut off")
    small = [EMBEDDING_FILE, HEAD_FILE, *(small_path(layer) for layer in range(len(store.layouts)))]
    absent = [str(path) for path in small if not (folder / path).is_file()]
    if absent:
        raise _unusable(folder, f"{absent[0]} is missing")
    return store


def find_store(root: Path, key: StoreKey) -> Store | None:
    """The finished store of ``key`` below ``root``; None when there is none."""
    folder = root / key.folder
    return open_store(folder) if folder.is_dir() else None


def verify_store(folder: Path) -> None:
    """Compare every byte with what was written.

    Raises:
        InputError: a file is missing or changed; names it, and with it the layer.
    """
    open_store(folder)
    try:
        verify_manifest(folder)
    except InputError as error:
        raise InputError(error.fact, "", f"`effitrain store rm {folder.name}` removes it: it is built anew.") from None


def remove_store(folder: Path) -> None:
    """Remove a store, finished or not."""
    remove_folder(folder)


@contextmanager
def building(root: Path, key: StoreKey, layouts: tuple[Layout, ...], tables_bytes: int) -> Iterator[Path | None]:
    """The unfinished folder of ``key`` to fill with what it lacks; it becomes the store when the block ends.

    Another process that builds the same is waited for, and None is given when it has finished.

    Raises:
        InputError: too little space, or the place cannot be written.
    """
    target = root / key.folder
    partial = target.with_name(target.name + SUFFIX)
    try:
        (partial / "layers").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{partial} cannot be made: {error.strerror}.", next_step=_ELSEWHERE) from None
    with _locked(partial):
        if target.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
            yield None
            return
        remove_stale(partial)
        remove_stale(partial / "layers")
        needed = sum(layout.nbytes for layout in layouts) + tables_bytes - folder_bytes(partial)
        check_space(root, "The store", needed, _ELSEWHERE)
        kinds = list(dict.fromkeys(layouts))
        about = {"version": VERSION, "key": asdict(key), "layers": [kinds.index(layout) for layout in layouts]}
        write_json(partial / ABOUT, {**about, "layouts": [asdict(layout) for layout in kinds]})
        try:
            yield partial
            write_manifest(partial)
        except Unwritable as error:
            raise InputError(error.fact, "", _ELSEWHERE) from None
        partial.rename(target)


_ELSEWHERE = "Set XDG_CACHE_HOME to a folder on a larger disk, or make room with `effitrain store rm`."


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone with ``folder`` among the processes that ask; a killed one lets go."""
    with _readable(folder, folder) as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def _readable(path: Path, folder: Path) -> Iterator[int]:
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.", next_step=_remedy(folder)) from None
    try:
        yield handle
    finally:
        os.close(handle)


def _layout_from(entry: Mapping[str, Any]) -> Layout:
    fields = [
        Field(
            field["name"],
            field["form"],
            tuple(field["shape"]),
            tuple(Part(part["dtype"], tuple(part["shape"]), part["start"]) for part in field["parts"]),
        )
        for field in entry["fields"]
    ]
    return Layout(tuple(fields), entry["nbytes"])


def _unusable(folder: Path, why: str) -> InputError:
    return InputError(f"{folder} is no usable store: {why}.", next_step=_remedy(folder))


def _remedy(folder: Path) -> str:
    name = folder.name
    return f"`effitrain store verify {name}` checks it, `effitrain store rm {name}` removes it: it is built anew."
