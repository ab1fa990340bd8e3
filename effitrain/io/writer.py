"""Write a safetensors file one tensor at a time, for files larger than memory."""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from effitrain.io.atomic import write_json
from effitrain.io.checkpoint import DTYPES
from effitrain.io.model_folder import INDEX, SINGLE

SHARD_BYTES = 5 * 10**9  # the size transformers writes, so that other tools meet what they know
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def write_shards(folder: Path, layout: Layout, read: Callable[[str], Tensor], shard_bytes: int = SHARD_BYTES) -> None:
    """Write the tensors of ``layout`` as a model's safetensors, a new file whenever one is full, and their index."""
    files: list[list[str]] = [[]]
    size = total = 0
    for name, (dtype, shape) in layout.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if files[-1] and size + nbytes > shard_bytes:
            files.append([])
            size = 0
        files[-1].append(name)
        size, total = size + nbytes, total + nbytes
    index = {}
    for number, names in enumerate(files, 1):
        file = SINGLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        stream_safetensors(folder / file, {name: layout[name] for name in names}, read)
        index.update(dict.fromkeys(names, file))
    if len(files) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})


def stream_safetensors(path: Path, layout: Layout, read: Callable[[str], Tensor]) -> None:
    """Write the tensors of ``layout`` (dtype and shape by name) to ``path``, asking ``read`` for one after the other.

    The caller makes the file appear as a whole, by writing into an ``atomic_folder``.

    Raises:
        ValueError: a tensor is not what ``layout`` says.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in layout.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # readers map the data in place, so it starts on a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name, (dtype, shape) in layout.items():
            tensor = read(name)
            if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
                raise ValueError(f"{name} came as {tensor.dtype} {tuple(tensor.shape)}, announced as {dtype} {shape}")
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
