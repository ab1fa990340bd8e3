"""A model's weights on disk, read one tensor at a time into memory of its own: no mapping, no pickle, no open files."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from effitrain.core.errors import InputError
from effitrain.core.paths import EMBEDDING, HEAD
from effitrain.core.spec import spec_from_config
from effitrain.io.model_folder import StoredTensor, on_disk, read_config, stored_tensors
from effitrain.io.nf4 import COMPANIONS, STATE, NF4Tensor, read_state, unhandled_quantisation

DTYPES = {  # by their names in safetensors
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_FINGERPRINT_BYTES = 4096


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model folder under the names they have in a causal language model ("model.layers.0....").

    Where head and embedding are tied there is one table: it is listed as the embedding and answers to both names.

    Attributes:
        folder: the model folder.
        tensors: place of every stored tensor, the parts of quantised weights too.
        tied: whether head and embedding are one.
        trusted: files may hold NaN.
    """

    trusted: ClassVar = False

    folder: Path
    tensors: Mapping[str, StoredTensor]
    tied: bool

    def names(self) -> list[str]:
        """The weights, a quantised one under one name."""
        return [name for name in self.tensors if not self._is_part(name)]

    def has(self, name: str) -> bool:
        """Whether there is such a weight."""
        return self._own(name) in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the weight, for NF4 that of the weight it stands for."""
        if self.is_nf4(name):
            return tuple(self._nf4_state(name)["shape"])
        return self._stored(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of the weight, for NF4 that of the weight it was made from."""
        if self.is_nf4(name):
            return getattr(torch, self._nf4_state(name)["dtype"])
        return _torch_dtype(name, self._stored(name))

    def is_nf4(self, name: str) -> bool:
        """Whether the weight is stored in NF4."""
        return f"{name}.{STATE}" in self.tensors

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """One weight, in its stored dtype.

        Raises:
            InputError: there is none of this name, it is quantised, or the file changed while in use.
        """
        if self.is_nf4(name):
            raise unhandled_quantisation(f"{name} is stored in NF4, which is handled for decoder linears only")
        return self._load(name).to(device)

    def read_nf4(self, name: str, device: torch.device | str = "cpu") -> NF4Tensor:
        """One weight stored in NF4, bit by bit as it is.

        Raises:
            InputError: parts are missing or of another layout than bitsandbytes' double quantisation.
        """
        parts = [name, *(f"{name}.{part}" for part in COMPANIONS if f"{name}.{part}" in self.tensors)]
        return NF4Tensor.from_state(name, {part: self._load(part) for part in parts}).to(device)

    def done_with(self, names: list[str]) -> None:
        """The files stay: they are the user's."""

    def fingerprint(self) -> str:
        """A hash of names, dtypes, shapes and a few kilobytes from the middle of every tensor."""
        digest = hashlib.sha256()
        for name, stored in sorted(self.tensors.items()):
            digest.update(f"{name} {stored.dtype} {stored.shape}\n".encode())
            count = min(stored.nbytes, _FINGERPRINT_BYTES)
            digest.update(bytes(_read_bytes(stored.file, stored.start + (stored.nbytes - count) // 2, count).numpy()))
        return digest.hexdigest()

    def _nf4_state(self, name: str) -> dict[str, Any]:
        return read_state(name, self._load(f"{name}.{STATE}"))

    def _own(self, name: str) -> str:
        return EMBEDDING if self.tied and name == HEAD else name

    def _is_part(self, name: str) -> bool:
        weight, _, part = name.partition(".weight.")
        return part in COMPANIONS and f"{weight}.weight" in self.tensors

    def _stored(self, name: str) -> StoredTensor:
        stored = self.tensors.get(self._own(name))
        if stored is None:
            names = self.names()
            shown = ", ".join(sorted(names)[:8]) + (", ..." if len(names) > 8 else "")
            raise InputError(
                f"{self.folder} holds no tensor {name}.",
                f"It holds {len(names)} tensors: {shown}",
                "Check that config.json belongs to these weights, and that the download is complete.",
            )
        return stored

    def _load(self, name: str) -> Tensor:
        return read_tensor(name, self._stored(name))


def open_checkpoint(folder: Path) -> Checkpoint:
    """The weights in a model folder; reads config, index and headers only.

    Raises:
        InputError: anything wrong that can be seen without reading the weights.
    """
    config = read_config(folder)
    check_quantisation(str(folder), config.get("quantization_config"))
    tensors = {
        canonical: stored for name, stored in stored_tensors(folder).items() if (canonical := canonical_name(name))
    }
    if not tensors:
        raise InputError(f"The weights in {folder} hold no tensor; {on_disk(folder)}", next_step="Get them again.")
    tied = spec_from_config(config, str(folder)).tied
    if tied and HEAD in tensors:
        head = tensors.pop(HEAD)
        if _differ(head, tensors.setdefault(EMBEDDING, head)):
            raise InputError(
                f"{folder} holds a head and an embedding that differ, and its config.json ties them.",
                "The model was probably trained with a head of its own.",
                'Write "tie_word_embeddings": false into config.json.',
            )
    return Checkpoint(folder, tensors, tied)


def read_tensor(name: str, stored: StoredTensor) -> Tensor:
    """The tensor that lies at ``stored``, in host memory of its own.

    Raises:
        InputError: its dtype is not handled, or the file is damaged.
    """
    dtype = _torch_dtype(name, stored)
    if math.prod(stored.shape) * dtype.itemsize != stored.nbytes:
        raise InputError(
            f"{stored.file} is damaged: {name} takes {stored.nbytes} bytes, not {stored.shape} values.",
            next_step="Get the file again.",
        )
    return _read_bytes(stored.file, stored.start, stored.nbytes).view(dtype).reshape(stored.shape)


def _torch_dtype(name: str, stored: StoredTensor) -> torch.dtype:
    if stored.dtype not in DTYPES:
        raise unhandled_quantisation(f"{name} is stored in {stored.dtype}, which is not handled")
    return DTYPES[stored.dtype]


def canonical_name(name: str) -> str | None:
    """The name in a causal language model; None for tables that are computed, which old checkpoints hold too."""
    if name.endswith(".rotary_emb.inv_freq"):
        return None
    return f"model.{name}" if name.startswith(("layers.", "embed_tokens.", "norm.")) else name


def check_quantisation(name: str, quantisation: Mapping[str, Any] | None) -> None:
    """Refuse the model ``name`` when its config says that it is quantised in another way than this module reads.

    Raises:
        InputError: it is.
    """
    if not quantisation:
        return
    method = quantisation.get("quant_method", "bitsandbytes" if "load_in_4bit" in quantisation else "a method unknown")
    if method != "bitsandbytes":
        raise unhandled_quantisation(f"{name} is quantised by {method}")
    kind = quantisation.get("bnb_4bit_quant_type", "fp4") if quantisation.get("load_in_4bit") else "int8"
    if kind != "nf4":
        raise unhandled_quantisation(f"{name} is quantised to {kind} by bitsandbytes")
    if not quantisation.get("bnb_4bit_use_double_quant"):
        raise unhandled_quantisation(f"{name} is in NF4 without double quantisation (bnb_4bit_use_double_quant)")


def _differ(a: StoredTensor, b: StoredTensor) -> bool:
    if a == b:
        return False
    same_kind = (a.dtype, a.shape) == (b.dtype, b.shape)
    return not same_kind or not torch.equal(*(_read_bytes(t.file, t.start, t.nbytes) for t in (a, b)))


def _read_bytes(path: Path, start: int, count: int) -> Tensor:
    """uint8 [count] from a file."""
    data = torch.empty(count, dtype=torch.uint8)
    try:
        with path.open("rb") as file:
            file.seek(start)
            got = file.readinto(data.numpy().data)
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}.", next_step="Check its permissions and the disk."
        ) from None
    if got != count:
        raise InputError(
            f"{path} ended {count - got} bytes early.",
            "It changed since it was opened.",
            "Run the command again, and leave the file as it is meanwhile.",
        )
    return data
