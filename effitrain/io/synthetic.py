"""Random weights of a model's shape, the same bytes on every device: for benchmarks and memory proofs.

Byte i of a tensor comes from a hash of i, so no generator state, chunk size or device has a say. Only integer
operations, exact conversions and single multiplications are used: they round alike everywhere.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from effitrain.core.errors import InputError
from effitrain.core.paths import EMBEDDING, HEAD, NORM, path_of
from effitrain.core.spec import ModelSpec
from effitrain.io.nf4 import BLOCK, NESTED_BLOCK, NF4Tensor

STD = 0.02  # initializer_range of Llama's and most other configs
NF4_RMS = 0.5172103047370911  # root mean square of nf4_code
_CHUNK = 2**21  # bytes made at once
_SCALE_SPREAD = 0.1  # scales lie within 10 % of their mean


@dataclass(frozen=True)
class SyntheticCheckpoint:
    """Weights made when they are read, under the protocol of ``Checkpoint``.

    Attributes:
        shapes: of every tensor by name, as ``shapes_of`` gives them.
        seed: other seeds give other weights.
        nf4: make the decoder's linears in NF4 directly.
        dense_dtype: of all other weights.
        trusted: there is no need to look for NaN.
    """

    trusted: ClassVar = True

    shapes: Mapping[str, tuple[int, ...]]
    seed: int
    nf4: bool
    dense_dtype: torch.dtype

    def names(self) -> list[str]:
        """Every weight."""
        return list(self.shapes)

    def has(self, name: str) -> bool:
        """Whether there is such a weight."""
        return name in self.shapes

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the weight.

        Raises:
            InputError: the model has none of this name.
        """
        if name not in self.shapes:
            raise InputError(
                f"The synthetic weights hold no tensor {name}.",
                "The model has another shape.",
                "Name another --model, or leave --weights out.",
            )
        return self.shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of the weights that are not in NF4."""
        return self.dense_dtype

    def is_nf4(self, name: str) -> bool:
        """Whether the weight is made in NF4: the matrices of the decoder's linears."""
        return self.nf4 and name.endswith("_proj.weight") and len(self.shape(name)) == 2

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """One weight on ``device``: ones for a norm, else uniform with standard deviation 0.02."""
        shape = self.shape(name)
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=self.dense_dtype, device=device)
        values = torch.empty(math.prod(shape), dtype=self.dense_dtype, device=device)
        for start in range(0, len(values), _CHUNK // 4):
            chunk = values[start : start + _CHUNK // 4]
            # int32 over its whole range has the standard deviation 2**32 / sqrt(12).
            integers = self._bytes(name, 4 * start, 4 * len(chunk), device).view(torch.int32)
            chunk.copy_(integers.to(torch.float32).mul_(STD * math.sqrt(12) / 2**32))
        return values.view(shape)

    def read_nf4(self, name: str, device: torch.device | str = "cpu") -> NF4Tensor:
        """One weight in NF4 on ``device``: random codes under scales that give a standard deviation of 0.02."""
        shape = self.shape(name)
        elements = math.prod(shape)
        blocks = math.ceil(elements / BLOCK)
        scale = STD / NF4_RMS
        return NF4Tensor(
            packed=self._all_bytes(name, math.ceil(elements / 2), device).view(-1, 1),
            absmax=self._all_bytes(f"{name}.absmax", blocks, device),
            nested_absmax=torch.full((math.ceil(blocks / NESTED_BLOCK),), _SCALE_SPREAD * scale, device=device),
            offset=torch.tensor(scale, device=device),
            shape=shape,
        )

    def fingerprint(self) -> str:
        """A hash of all that decides the bytes."""
        shapes = sorted((name, tuple(shape)) for name, shape in self.shapes.items())
        return hashlib.sha256(repr((shapes, self.seed, self.nf4, str(self.dense_dtype))).encode()).hexdigest()

    def _all_bytes(self, name: str, count: int, device: torch.device | str) -> Tensor:
        data = torch.empty(count, dtype=torch.uint8, device=device)
        for start in range(0, count, _CHUNK):
            chunk = data[start : start + _CHUNK]
            chunk.copy_(self._bytes(name, start, len(chunk), device))
        return data

    def _bytes(self, name: str, start: int, count: int, device: torch.device | str) -> Tensor:
        """Bytes ``start`` (a multiple of 8) to ``start + count`` of the stream of ``name``, uint8 [count]."""
        key = int.from_bytes(hashlib.sha256(f"{self.seed}:{name}".encode()).digest()[:8], "little", signed=True)
        counter = torch.arange(start // 8, math.ceil((start + count) / 8), dtype=torch.int64, device=device)
        return _mix(counter, key).view(torch.uint8)[:count]


class EmptyCheckpoint(SyntheticCheckpoint):
    """Weights of the right shape and no values, for steps that are run on shapes alone."""

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """One weight, uninitialised."""
        return torch.empty(self.shape(name), dtype=self.dense_dtype, device=device)

    def _all_bytes(self, name: str, count: int, device: torch.device | str) -> Tensor:
        return torch.empty(count, dtype=torch.uint8, device=device)


def shapes_of(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a checkpoint of ``spec``; a tied head has none."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (spec.vocab, spec.hidden)}
    for layer in spec.layers:
        for linear in layer.linears:
            shapes[path_of(layer.index, linear.name, "weight")] = (linear.out_features, linear.in_features)
            if linear.bias:
                shapes[path_of(layer.index, linear.name, "bias")] = (linear.out_features,)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[path_of(layer.index, norm, "weight")] = (spec.hidden,)
        if layer.other_params > 2 * spec.hidden:
            for norm in ("self_attn.q_norm", "self_attn.k_norm"):
                shapes[path_of(layer.index, norm, "weight")] = (spec.head_dim,)
    shapes[NORM] = (spec.hidden,)
    if not spec.tied:
        shapes[HEAD] = (spec.head.out_features, spec.head.in_features)
    return shapes


def _mix(counter: Tensor, key: int) -> Tensor:
    """SplitMix64 (Steele, Lea and Flood 2014) of ``counter`` int64, in place; products wrap around at 64 bits."""
    x = counter.mul_(_signed(0x9E3779B97F4A7C15)).add_(key)
    x.bitwise_xor_(_shift_right(x, 30)).mul_(_signed(0xBF58476D1CE4E5B9))
    x.bitwise_xor_(_shift_right(x, 27)).mul_(_signed(0x94D049BB133111EB))
    return x.bitwise_xor_(_shift_right(x, 31))


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own carries the sign in."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    return constant - 2**64
