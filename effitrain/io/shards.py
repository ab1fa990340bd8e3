"""A checkpoint on the hub, read without keeping it: each file is fetched when it is asked for, and goes when nobody
will ask again. A 70B so takes the disk of its quantised form and of two files, not 141 GB more.
"""

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from effitrain.core.errors import InputError
from effitrain.core.paths import EMBEDDING, HEAD
from effitrain.core.spec import spec_from_config
from effitrain.io.checkpoint import Checkpoint, canonical_name, check_quantisation
from effitrain.io.hub import ModelSource, fetch_file, revision_of
from effitrain.io.model_folder import INDEX, SINGLE, StoredTensor, read_header, read_json


class Shards(Mapping[str, StoredTensor]):
    """Where each tensor is, by its name in a causal language model; asking for one fetches its file.

    Args:
        source: the model.
        revision: the commit that all files are of.
        folder: where files are put.
    """

    def __init__(self, source: ModelSource, revision: str, folder: Path):
        self.source, self.revision, self.folder = source, revision, folder
        index = fetch_file(source, INDEX, revision, folder)
        files = read_json(index)["weight_map"] if index else dict.fromkeys(read_header(self._fetched(SINGLE)), SINGLE)
        self.stored = {canonical: name for name in files if (canonical := canonical_name(name))}
        self.files = {canonical: files[name] for canonical, name in self.stored.items()}
        self._header = cache(lambda file: read_header(self._fetched(file)))

    def __getitem__(self, name: str) -> StoredTensor:
        self._fetched(self.files[name])
        return self._header(self.files[name])[self.stored[name]]

    def __contains__(self, name: object) -> bool:
        return name in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def discard(self, done: set[str]) -> None:
        """Remove the files all of whose tensors are in ``done``."""
        needed = {file for name, file in self.files.items() if name not in done}
        for file in set(self.files.values()) - needed:
            (self.folder / file).unlink(missing_ok=True)

    def _fetched(self, file: str) -> Path:
        path = self.folder / file
        if not path.is_file() and fetch_file(self.source, file, self.revision, self.folder) is None:
            raise InputError(
                f"{self.source.hub_id} has no {file} on the hub.",
                "Its weights are stored as pickle, which is not read, or the repository is incomplete.",
                "Name a model with safetensors.",
            )
        return path


@dataclass(frozen=True)
class HubCheckpoint(Checkpoint):
    """The weights of a model on the hub, for one pass over them."""

    tensors: Shards
    _done: set[str]

    def done_with(self, names: list[str]) -> None:
        """Remove the files that hold nothing but what was asked for already."""
        self._done.update(names)
        done = {name for name in self.tensors if name in self._done or _weight_of(name) in self._done}
        self.tensors.discard(done)

    def close(self) -> None:
        """Remove what is left."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def fingerprint(self) -> str:
        """A hash of the repository and its commit."""
        return _digest(self.tensors.source, self.tensors.revision)


def open_on_hub(source: ModelSource, folder: Path) -> HubCheckpoint:
    """The weights of ``source`` on the hub; of a sharded model only the index is fetched now.

    Args:
        source: without a folder.
        folder: for files in use; what an earlier process left of the same commit is used again.

    Raises:
        InputError: they cannot be had, or are quantised in a way that is not handled.
    """
    check_quantisation(source.hub_id, source.config.get("quantization_config"))
    revision = revision_of(source)
    place = folder / revision
    shards = Shards(source, revision, place)
    tied = spec_from_config(source.config, source.name).tied
    if tied and HEAD in shards:  # one table: the embedding's, as transformers has it
        file, name = shards.files.pop(HEAD), shards.stored.pop(HEAD)
        shards.files.setdefault(EMBEDDING, file)
        shards.stored.setdefault(EMBEDDING, name)
    return HubCheckpoint(place, shards, tied, set())


def hub_fingerprint(source: ModelSource) -> str:
    """A hash of the repository and the commit of ``source``.

    Raises:
        InputError: the hub cannot be asked.
    """
    return _digest(source, revision_of(source))


def _digest(source: ModelSource, revision: str) -> str:
    return hashlib.sha256(f"{source.hub_id}@{revision}".encode()).hexdigest()


def _weight_of(part: str) -> str:
    """The weight that ``part`` (``...weight.absmax``) belongs to."""
    return part.partition(".weight.")[0] + ".weight"
