"""One weight in NF4 with double quantisation, in the layout that bitsandbytes and transformers save.

Weights: two to a byte, the first in the high half, each an index into ``nf4_code``. A block of 64 shares a scale
``absmax``; scales are indices into ``dynamic_code``, times the ``nested_absmax`` of their 256, plus ``offset``.
Dettmers et al. 2023, QLoRA, section 3.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from effitrain.core.errors import InputError
from effitrain.kernels.nf4_dequantize import BLOCK, NESTED_BLOCK, dynamic_code, nf4_code

STATE = "quant_state.bitsandbytes__nf4"
COMPANIONS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE)
_STATE_BYTES = 320  # of the JSON, filled up with blanks, so that a file can be laid out before its weights are known
# What config.json says of a checkpoint in this form.
QUANTISATION = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}


@dataclass(frozen=True, eq=False)
class NF4Tensor:
    """The quantised form of a weight of ``shape`` with n elements in b = ceil(n / 64) blocks.

    Attributes:
        packed: uint8 [ceil(n / 2), 1].
        absmax: uint8 [b].
        nested_absmax: float32 [ceil(b / 256)].
        offset: float32 [].
        shape: of the weight.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor
    offset: Tensor
    shape: tuple[int, ...]
    blocksize: int = BLOCK
    nested_blocksize: int = NESTED_BLOCK

    @property
    def nbytes(self) -> int:
        """Bytes of the four tensors."""
        return sum(tensor.nbytes for tensor in (self.packed, self.absmax, self.nested_absmax, self.offset))

    def to(self, device: torch.device | str) -> "NF4Tensor":
        """The same on ``device``; tensors already there are shared."""
        return replace(
            self,
            packed=self.packed.to(device),
            absmax=self.absmax.to(device),
            nested_absmax=self.nested_absmax.to(device),
            offset=self.offset.to(device),
        )

    @staticmethod
    def from_state(name: str, tensors: Mapping[str, Tensor]) -> "NF4Tensor":
        """The weight ``name`` from ``tensors``: ``name`` itself and ``name.absmax``, ``name.quant_map``, ...

        Raises:
            InputError: it is quantised in a way that is not handled, or parts are missing.
        """
        absent = [part for part in COMPANIONS if f"{name}.{part}" not in tensors]
        if absent:
            hint = "It was probably quantised without double quantisation." if "nested_absmax" in absent else ""
            raise unhandled_quantisation(f"{name} has no {', '.join(absent)}", hint)
        state = read_state(name, tensors[f"{name}.{STATE}"])
        blocks = (state["blocksize"], state["nested_blocksize"])
        if blocks != (BLOCK, NESTED_BLOCK):
            raise unhandled_quantisation(f"{name} has blocks of {blocks[0]} and {blocks[1]}")
        for part, code in (("quant_map", nf4_code()), ("nested_quant_map", dynamic_code())):
            if not torch.allclose(tensors[f"{name}.{part}"].float(), code, rtol=1e-5, atol=1e-7):
                raise unhandled_quantisation(f"{name} has a {part} of its own")
        return NF4Tensor(
            # Other storage dtypes (bnb_4bit_quant_storage) hold the same bytes.
            packed=tensors[name].contiguous().view(torch.uint8).reshape(-1, 1),
            absmax=tensors[f"{name}.absmax"],
            nested_absmax=tensors[f"{name}.nested_absmax"],
            offset=torch.tensor(state["nested_offset"], dtype=torch.float32),
            shape=tuple(state["shape"]),
        )

    def to_state(self, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """The host tensors that transformers with bitsandbytes saves for the weight ``name`` of ``dtype``."""
        state = {
            "quant_type": "nf4",
            "blocksize": self.blocksize,
            "dtype": str(dtype).removeprefix("torch."),
            "shape": list(self.shape),
            "nested_blocksize": self.nested_blocksize,
            "nested_dtype": "float32",
            "nested_offset": self.offset.item(),
        }
        return {
            name: self.packed.cpu(),
            f"{name}.absmax": self.absmax.cpu(),
            f"{name}.quant_map": nf4_code().clone(),
            f"{name}.nested_absmax": self.nested_absmax.cpu(),
            f"{name}.nested_quant_map": dynamic_code().clone(),
            f"{name}.{STATE}": torch.tensor(list(json.dumps(state).ljust(_STATE_BYTES).encode()), dtype=torch.uint8),
        }


def state_layout(name: str, shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtypes and shapes of what ``to_state`` gives for a weight of ``shape``."""
    size = math.prod(shape)
    blocks = -(-size // BLOCK)
    return {
        name: (torch.uint8, (-(-size // 2), 1)),
        f"{name}.absmax": (torch.uint8, (blocks,)),
        f"{name}.quant_map": (torch.float32, tuple(nf4_code().shape)),
        f"{name}.nested_absmax": (torch.float32, (-(-blocks // NESTED_BLOCK),)),
        f"{name}.nested_quant_map": (torch.float32, tuple(dynamic_code().shape)),
        f"{name}.{STATE}": (torch.uint8, (_STATE_BYTES,)),
    }


def read_state(name: str, tensor: Tensor) -> dict[str, Any]:
    """What the ``quant_state`` tensor of the weight ``name`` says, JSON as bytes.

    Raises:
        InputError: it cannot be read, or is not one of double quantisation.
    """
    try:
        state = json.loads(bytes(tensor.tolist()))
        return {key: state[key] for key in ("shape", "dtype", "blocksize", "nested_blocksize", "nested_offset")}
    except (ValueError, KeyError, TypeError):
        raise unhandled_quantisation(
            f"{name} has a quant_state without double quantisation, or a damaged one"
        ) from None


def unhandled_quantisation(fact: str, cause: str = "") -> InputError:
    """The error for weights quantised in another way than this module's."""
    return InputError(
        f"{fact}.",
        cause,
        "Quantised weights must be bitsandbytes NF4 with double quantisation and blocks of 64."
        " Name the original 16-bit model: it is quantised on loading.",
    )
