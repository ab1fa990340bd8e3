"""Builds the store of a checkpoint, one tensor in memory at a time, and goes on where a killed builder stopped."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from effitrain.core.spec import ModelSpec
from effitrain.io.atomic import replacing
from effitrain.io.blob import write_blob
from effitrain.io.store import TABLES, Store, StoreKey, building, find_store, layer_path, open_store
from effitrain.io.synthetic import shapes_of
from effitrain.io.writer import stream_safetensors
from effitrain.quant.read import Weights, read_dense
from effitrain.stream.fresh import FreshLayers, weight_name


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
) -> Store:
    """The store of ``key`` below ``root``, built when it is not there.

    Holds the tensor at hand, that tensor in the compute dtype, and what quantising makes of it: less than three of the
    largest tensors.

    Args:
        root: folder of all stores.
        key: the checkpoint and the form of the store.
        spec: the model's shape.
        weights: the checkpoint.
        progress: told how many parts are done, of how many.

    Raises:
        InputError: a weight is missing or wrong, there is too little space, or the place cannot be written.
    """
    return find_store(root, key) or _build(root, key, spec, weights, progress)


def _build(
    root: Path, key: StoreKey, spec: ModelSpec, weights: StoredWeights, progress: Callable[[int, int], None]
) -> Store:
    layers = FreshLayers(spec, weights, key.quant, key.dtype)
    layouts = tuple(layers.layout(layer) for layer in range(spec.num_layers))
    tables = {name: (weights.dtype(name), shape) for name, shape in table_shapes(spec).items()}
    size = sum(math.prod(shape) * dtype.itemsize for dtype, shape in tables.values())
    with building(root, key, layouts, size) as partial:
        if partial is not None:
            for layer, layout in enumerate(layouts):
                path = layer_path(partial, layer)
                if not path.is_file():
                    with replacing(path) as tmp:
                        write_blob(tmp, layout, lambda field, layer=layer: layers.weight(layer, field))  # type: ignore[misc]
                weights.done_with([weight_name(layer, field.name) for field in layout.fields])
                progress(layer + 1, spec.num_layers + 1)
            _write_tables(partial / TABLES, tables, weights)
            progress(spec.num_layers + 1, spec.num_layers + 1)
    return open_store(root / key.folder)


def table_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """All tensors but the matrices of the decoder linears: embedding, head, norms and biases."""
    streamed = {weight_name(layer.index, linear.name) for layer in spec.layers for linear in layer.linears}
    return {name: shape for name, shape in shapes_of(spec).items() if name not in streamed}


def _write_tables(path: Path, tables: dict[str, tuple[torch.dtype, tuple[int, ...]]], weights: StoredWeights) -> None:
    def read(name: str) -> Tensor:
        dtype, shape = tables[name]
        return read_dense(weights, name, shape, dtype)

    if not path.is_file():
        with replacing(path) as tmp:
            stream_safetensors(tmp, tables, read)
    weights.done_with(list(tables))
