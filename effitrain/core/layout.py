"""Where the frozen weights of one decoder layer lie in one contiguous blob of bytes.

Integers alone, so that the planner counts with the same function that the store is written by.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from effitrain.core.spec import LayerSpec

NF4 = "nf4"
# NF4 as in bitsandbytes: an 8-bit scale per block of 64 weights, a 4-byte scale per 256 of those.
BLOCK, NESTED_BLOCK = 64, 256
ALIGN = 256  # of every part: CUDA's own allocations start on such multiples, and kernels load 16 bytes at once
PAGE = 4096  # of a blob: direct reads and pinned memory go by whole pages

_WIDTHS = {"uint8": 1, "float32": 4, "bfloat16": 2, "float16": 2}
_TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Part:
    """One tensor in a blob, from byte ``start`` on; ``dtype`` by its name in torch."""

    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * _WIDTHS[self.dtype]


@dataclass(frozen=True)
class Field:
    """One weight in a blob.

    Attributes:
        name: within the layer, as ``self_attn.q_proj``.
        form: ``nf4``, or the dtype of a plain weight (``bf16``, ``fp16``, ``fp32``).
        shape: [out, in].
        parts: packed codes, scales, scales of scales and offset; or the weight itself.
    """

    name: str
    form: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Layout:
    """The weights of one layer, in order, and the bytes of the blob, a multiple of 4 KiB."""

    fields: tuple[Field, ...]
    nbytes: int


def layer_layout(layer: LayerSpec, form: Callable[[str], str]) -> Layout:
    """The layout of a layer whose linear of each name is stored as ``form(name)`` says: ``nf4`` or a dtype."""
    fields, end = [], 0
    for linear in layer.linears:
        shape, kind = (linear.out_features, linear.in_features), form(linear.name)
        parts = []
        for dtype, size in _nf4_parts(linear.weights) if kind == NF4 else [(_TORCH_NAMES[kind], shape)]:
            parts.append(Part(dtype, size, _up(end, ALIGN)))
            end = parts[-1].start + parts[-1].nbytes
        fields.append(Field(linear.name, kind, shape, tuple(parts)))
    return Layout(tuple(fields), _up(end, PAGE))


def _nf4_parts(weights: int) -> list[tuple[str, tuple[int, ...]]]:
    blocks = -(-weights // BLOCK)
    return [
        ("uint8", (-(-weights // 2), 1)),
        ("uint8", (blocks,)),
        ("float32", (-(-blocks // NESTED_BLOCK),)),
        ("float32", ()),
    ]


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
