"""Weights from where they are stored, checked, in the form in which they are used."""

from typing import ClassVar, Protocol

import torch
from torch import Tensor

from effitrain.core.errors import InputError
from effitrain.io.nf4 import NF4Tensor
from effitrain.quant.nf4 import quantize

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_NOT_TOGETHER = (
    "The checkpoint and its config.json do not belong together.",
    "Get both again, from one place, or name another --model.",
)


class Weights(Protocol):
    """A source of named tensors: a checkpoint, a store or synthetic weights. What is ``trusted`` holds no NaN."""

    trusted: ClassVar[bool]

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """One tensor on ``device``, in its stored dtype."""

    def is_nf4(self, name: str) -> bool:
        """Whether the weight is stored in NF4."""

    def read_nf4(self, name: str, device: torch.device | str = "cpu") -> NF4Tensor:
        """One weight stored in NF4 on ``device``, as it is."""

    def fingerprint(self) -> str:
        """Changes when the weights do."""


def read_dense(
    weights: Weights, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Tensor:
    """The tensor ``name`` on ``device`` in ``dtype``.

    Raises:
        InputError: it is missing, has another shape, or holds NaN or infinity.
    """
    tensor = weights.read(name, device)
    if tuple(tensor.shape) != shape:
        raise InputError(
            f"{name} has the shape {tuple(tensor.shape)}, and config.json asks for {shape}.",
            *_NOT_TOGETHER,
        )
    if not weights.trusted and not _finite(tensor):
        raise InputError(f"{name} holds NaN or infinite values.", "The checkpoint is damaged.", "Get it again.")
    return tensor.to(dtype)


def read_frozen(
    weights: Weights,
    name: str,
    shape: tuple[int, ...],
    quant: str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Tensor | NF4Tensor:
    """The weight ``name`` of a decoder linear: as it is when stored in NF4, else in NF4 or ``dtype`` as ``quant`` says.

    Raises:
        InputError: it is missing, has another shape, or holds NaN or infinity.
    """
    if not weights.is_nf4(name):
        full = read_dense(weights, name, shape, dtype, device)
        return quantize(full) if quant == "nf4" else full
    stored = weights.read_nf4(name, device)
    if tuple(stored.shape) != shape:
        raise InputError(
            f"{name} has the shape {tuple(stored.shape)}, and config.json asks for {shape}.", *_NOT_TOGETHER
        )
    return stored


def _finite(tensor: Tensor) -> bool:
    """Least and greatest tell: NaN wins both. A sum in float32 would cast the whole tensor first."""
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())
