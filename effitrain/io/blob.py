"""The weights in a layer's blob of bytes, as tensors that share its memory."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from effitrain.core.layout import NF4, Field, Layout, Part
from effitrain.io.nf4 import NF4Tensor

Weight = Tensor | NF4Tensor


def views(blob: Tensor, layout: Layout) -> dict[str, Weight]:
    """Every weight of ``layout`` by its name, as a view of ``blob`` [at least ``layout.nbytes``] uint8."""
    return {field.name: _assemble(field, [_view(blob, part) for part in field.parts]) for field in layout.fields}


def parts_of(weight: Weight) -> list[Tensor]:
    """The tensors of a weight in the order of a field's parts."""
    if isinstance(weight, NF4Tensor):
        return [weight.packed, weight.absmax, weight.nested_absmax, weight.offset]
    return [weight]


def write_blob(path: Path, layout: Layout, read: Callable[[Field], Weight]) -> None:
    """Write the blob of ``layout`` to a new file, asking ``read`` for one weight after the other.

    Raises:
        ValueError: a weight is not what the layout says.
        OSError: the place cannot be written.
    """
    with path.open("wb") as file:
        for field in layout.fields:
            for part, tensor in zip(field.parts, parts_of(read(field)), strict=True):
                file.seek(part.start)
                file.write(_bytes(part, tensor).numpy().data)
        file.truncate(layout.nbytes)
        file.flush()
        os.fsync(file.fileno())


def _bytes(part: Part, tensor: Tensor) -> Tensor:
    if (str(tensor.dtype), tuple(tensor.shape)) != (f"torch.{part.dtype}", part.shape):
        raise ValueError(f"came as {tensor.dtype} {tuple(tensor.shape)}, the layout says {part.dtype} {part.shape}")
    return tensor.contiguous().cpu().reshape(-1).view(torch.uint8)


def _view(blob: Tensor, part: Part) -> Tensor:
    return blob[part.start : part.start + part.nbytes].view(getattr(torch, part.dtype)).view(part.shape)


def _assemble(field: Field, parts: list[Tensor]) -> Weight:
    if field.form != NF4:
        return parts[0]
    packed, absmax, nested_absmax, offset = parts
    return NF4Tensor(packed, absmax, nested_absmax, offset, field.shape)
