"""A model folder written from an original and the tensors that training changed, one tensor in memory at a time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effitrain.core.paths import HEAD
from effitrain.io.atomic import atomic_folder, write_json
from effitrain.io.model_folder import copy_companions
from effitrain.io.writer import SHARD_BYTES, write_shards
from effitrain.model.load import Base


def write_model(
    target: Path,
    base: Base,
    trained: Mapping[str, Tensor],
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write ``base`` with the ``trained`` tensors in the place of its own, as a folder that stock transformers loads.

    Args:
        target: written complete or not at all.
        base: the original, with its files on disk; its other tensors stay bit by bit as they are.
        trained: by name.
        dtype: of the trained tensors in the folder, that in which the run computed with them.
        shard_bytes: largest size of a file.
    """
    source: Any = base.weights()

    def read(name: str) -> Tensor:
        return trained[name].detach().to("cpu", dtype) if name in trained else source.read(name)

    layout = {
        name: (dtype if name in trained else source.dtype(name), tuple(source.shape(name)))
        for name in source.names()
        if not (base.spec.tied and name == HEAD)
    }
    with atomic_folder(target) as tmp:
        if base.source.folder:
            copy_companions(base.source.folder, tmp)
        write_shards(tmp, layout, read, shard_bytes)
        config = {key: value for key, value in base.source.config.items() if key != "torch_dtype"}
        write_json(tmp / "config.json", {**config, "dtype": str(dtype).removeprefix("torch.")})
