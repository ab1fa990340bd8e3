"""Builds the store of a checkpoint, one tensor in memory at a time, and goes on where a killed builder stopped."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from effitrain.core.paths import EMBEDDING, layer_of, path_of
from effitrain.core.spec import ModelSpec
from effitrain.io.atomic import replacing
from effitrain.io.blob import write_blob
from effitrain.io.store import (
    EMBEDDING_FILE,
    HEAD_FILE,
    Store,
    StoreKey,
    building,
    find_store,
    layer_path,
    open_store,
    small_path,
)
from effitrain.io.synthetic import shapes_of
from effitrain.io.writer import stream_safetensors
from effitrain.quant.read import DTYPES, Weights, read_dense
from effitrain.stream.fresh import FreshLayers


class StoredWeights(Weights, Protocol):
    """A checkpoint, which knows the dtypes of its tensors."""

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of one tensor."""

    def done_with(self, names: list[str]) -> None:
        """Nobody will ask for these again."""


def ensure_store(
    root: Path,
    key: StoreKey,
    spec: ModelSpec,
    weights: StoredWeights,
    progress: Callable[[int, int], None] = lambda done, parts: None,
    device: torch.device | str = "cpu",
) -> Store:
    """The store of ``key`` below ``root``, built when it is not there.

    Holds the tensor at hand, that tensor in the compute dtype, and what quantising makes of it: less than three of the
    largest tensors. One part comes after the other: quantising takes all cores that torch is given, and two parts at a
    time hold twice as much. Two threads with a core each took 16.6 s for four layers of a 1B shape on a busy two-core
    machine, one took 11.4 and 23.4 s, either 6.5 s of processor time: no gain to pay for.

    Args:
        root: folder of all stores.
        key: the checkpoint and the form of the store.
        spec: the model's shape.
        weights: the checkpoint.
        progress: told how many parts are done, of how many.
        device: where weights are quantised.

    Raises:
        InputError: a weight is missing or wrong, there is too little space, or the place cannot be written.
    """
    return find_store(root, key) or _build(root, key, spec, weights, progress, device)


def _build(
    root: Path,
    key: StoreKey,
    spec: ModelSpec,
    weights: StoredWeights,
    progress: Callable[[int, int], None],
    device: torch.device | str,
) -> Store:
    layers = FreshLayers(spec, weights, key.quant, key.dtype, device)
    layouts = tuple(layers.layout(layer) for layer in range(spec.num_layers))
    tables = table_shapes(spec)
    size = sum(math.prod(shape) * DTYPES[key.dtype].itemsize for table in tables.values() for shape in table.values())
    with building(root, key, layouts, size) as partial:
        if partial is not None:
            for done, (path, table) in enumerate(tables.items(), 1):
                _write_table(partial / path, table, weights)
                weights.done_with(list(table))
                if (layer := done - 2) in range(spec.num_layers):
                    _write_layer(layer_path(partial, layer), layer, layers)
                    weights.done_with([path_of(layer, field.name, "weight") for field in layouts[layer].fields])
                progress(done, len(tables))
    return open_store(root / key.folder)


def table_shapes(spec: ModelSpec) -> dict[Path, dict[str, tuple[int, ...]]]:
    """All tensors but the matrices of the decoder linears, by the file they go to: embedding, each layer's norms and
    biases, last norm and head. The order is that of checkpoints.
    """
    matrices = {f"{path}.weight" for path in spec.linears}
    files = [EMBEDDING_FILE, *(small_path(layer) for layer in range(spec.num_layers)), HEAD_FILE]
    tables: dict[Path, dict[str, tuple[int, ...]]] = {file: {} for file in files}
    for name, shape in shapes_of(spec).items():
        if name not in matrices:
            tables[_file_of(name)][name] = shape
    return tables


def _file_of(name: str) -> Path:
    layer = layer_of(name)
    if layer is not None:
        return small_path(layer)
    return EMBEDDING_FILE if name == EMBEDDING else HEAD_FILE


def _write_layer(path: Path, layer: int, layers: FreshLayers) -> None:
    if not path.is_file():
        with replacing(path) as tmp:
            write_blob(tmp, layers.layout(layer), lambda field: layers.weight(layer, field))


def _write_table(path: Path, shapes: dict[str, tuple[int, ...]], weights: StoredWeights) -> None:
    if path.is_file():
        return
    table = {name: (weights.dtype(name), shape) for name, shape in shapes.items()}

    def read(name: str) -> Tensor:
        dtype, shape = table[name]
        return read_dense(weights, name, shape, dtype)

    with replacing(path) as tmp:
        stream_safetensors(tmp, table, read)
