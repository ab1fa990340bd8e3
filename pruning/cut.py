"""A small model as a view of a large one: every tensor a selection of rows and columns, read when it is asked for."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from effitrain.core.cut import CUT_FACTS
from effitrain.core.errors import InputError
from effitrain.core.keep import KeepMap
from effitrain.core.paths import layer_of, path_of
from effitrain.core.spec import LinearSpec, ModelSpec, pruned_config
from effitrain.io.atomic import atomic_folder, write_json
from effitrain.io.keep import KEEP, write_keep
from effitrain.io.model_folder import copy_companions
from effitrain.io.nf4 import QUANTISATION, NF4Tensor, state_layout
from effitrain.io.writer import write_shards
from effitrain.quant.read import Weights, read_dense


class Source(Weights, Protocol):
    """The full-size weights: a checkpoint on disk or synthetic ones."""

    def names(self) -> list[str]:
        """Every weight."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape."""

    def dtype(self, name: str) -> torch.dtype:
        """Its dtype."""


def _unchanged(name: str, tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class CutWeights:
    """The weights that a keep map leaves of ``source``, under the protocol of a checkpoint.

    Attributes:
        source: the full-size weights, not quantised.
        spec: their shape.
        keep: what survives.
        edit: changes a cut tensor, given its name, such as an ``Aligner``; shape and dtype stay.
        biases: paths of linears that get a bias, zero before it is edited, if they have none.
        trusted: files may hold NaN.
    """

    trusted: ClassVar = False

    source: Source
    spec: ModelSpec
    keep: KeepMap
    edit: Callable[[str, Tensor], Tensor] = _unchanged
    biases: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.keep.check(self.spec)
        quantised = next((name for name in self.source.names() if self.source.is_nf4(name)), None)
        if quantised:
            raise InputError(
                f"{self.spec.name} is stored in NF4 ({quantised}), which cannot be cut.",
                "A block of 64 weights shares a scale, and pruning takes blocks apart.",
                "Name the original 16-bit model with --model.",
            )

    @cached_property
    def _linears(self) -> dict[str, tuple[int, LinearSpec]]:
        return {
            path_of(layer.index, linear.name): (layer.index, linear)
            for layer in self.spec.layers
            for linear in layer.linears
        }

    @cached_property
    def _added(self) -> Mapping[str, str]:
        """New biases, and the weights that they stand beside."""
        names = {f"{path}.bias": f"{path}.weight" for path in self.biases}
        return {name: weight for name, weight in names.items() if not self.source.has(name)}

    @cached_property
    def small_spec(self) -> ModelSpec:
        """The shape of what is left."""
        return self.spec.resized(self.keep.widths).with_biases(self.biases)

    def names(self) -> list[str]:
        """Every weight, the layers' in the order of layers."""
        return sorted([*self.source.names(), *self._added], key=_layer_of)

    def has(self, name: str) -> bool:
        """Whether there is such a weight."""
        return name in self._added or self.source.has(name)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of the weight."""
        return self.source.dtype(self._added.get(name, name))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the weight after cutting."""
        if name in self._added:
            return self.shape(self._added[name])[:1]
        whole, kept = self.source.shape(name), self._kept(name)
        return tuple(size if i is None else len(i) for size, i in zip(whole, kept or [None] * len(whole), strict=True))

    def is_nf4(self, name: str) -> bool:
        """Never: a selection of quantised weights would need other scales."""
        return False

    def read_nf4(self, name: str, device: torch.device | str = "cpu") -> NF4Tensor:
        """There is none."""
        raise RuntimeError(f"{name} was read as NF4, which cut weights never are")

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """One weight: the kept rows and columns, bit by bit as they are unless they are edited."""
        if name in self._added:
            return self.edit(name, torch.zeros(self.shape(name), dtype=self.dtype(name))).to(device)
        tensor = self.source.read(name)
        for dim, indices in enumerate(self._kept(name)):
            if indices is not None:
                tensor = tensor.index_select(dim, torch.tensor(indices))
        return self.edit(name, tensor).to(device)

    def fingerprint(self) -> str:
        """That of the source: it is what an adapter of the full-size model belongs to."""
        return self.source.fingerprint()

    def is_matrix(self, name: str) -> bool:
        """Whether it is the matrix of a decoder linear."""
        return name.removesuffix(".weight") in self._linears

    def _kept(self, name: str) -> tuple[list[int] | None, ...]:
        """Kept indices by dimension; empty for what is not cut."""
        path, _, kind = name.rpartition(".")
        if path not in self._linears:
            return ()
        layer, linear = self._linears[path]
        rows = self.keep.indices(layer, linear.out_axis)
        return (rows,) if kind == "bias" else (rows, self.keep.indices(layer, linear.in_axis))


class InNF4:
    """The tensors that stand for ``weights`` in a checkpoint in NF4; the parts of a matrix are asked for one after the
    other.
    """

    def __init__(self, weights: CutWeights, quantize: Callable[[Tensor], NF4Tensor]):
        self.weights, self.quantize = weights, quantize
        matrices = [name for name in weights.names() if weights.is_matrix(name)]
        self._parts = {part: name for name in matrices for part in state_layout(name, weights.shape(name))}
        self._at_hand: tuple[str, Mapping[str, Tensor]] = ("", {})

    def names(self) -> list[str]:
        """Every stored tensor, in the order of layers."""
        plain = [name for name in self.weights.names() if not self.weights.is_matrix(name)]
        return sorted([*plain, *self._parts], key=_layer_of)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of the stored tensor."""
        return self._layout(name)[0] if name in self._parts else self.weights.dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape."""
        return self._layout(name)[1] if name in self._parts else self.weights.shape(name)

    def read(self, name: str) -> Tensor:
        """The stored tensor."""
        if name not in self._parts:
            return self.weights.read(name)
        matrix = self._parts[name]
        if self._at_hand[0] != matrix:
            full = read_dense(self.weights, matrix, self.weights.shape(matrix), self.weights.dtype(matrix))
            self._at_hand = matrix, self.quantize(full).to_state(matrix, full.dtype)
        return self._at_hand[1][name]

    def _layout(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        matrix = self._parts[name]
        return state_layout(matrix, self.weights.shape(matrix))[name]


def _layer_of(name: str) -> int:
    """The layer that a tensor belongs to; what lies outside the layers comes first."""
    layer = layer_of(name)
    return -1 if layer is None else layer


def write_cut(
    target: Path,
    weights: CutWeights,
    config: Mapping[str, Any],
    source: Path | None,
    facts: Callable[[], Mapping[str, Any]] = dict,
    progress: Callable[[str], None] = lambda name: None,
    quantize: Callable[[Tensor], NF4Tensor] | None = None,
) -> None:
    """Write a small model as a folder, complete or not at all, one tensor in memory at a time.

    Quantised, it is what transformers with bitsandbytes saves: no 16-bit copy of it is ever on the disk.

    Args:
        target: the new folder: config.json, safetensors, keep.safetensors, and the tokenizer of ``source``.
        weights: the small model.
        config: of the full-size model.
        source: the folder of the full-size model; None for synthetic weights.
        facts: asked at the end for what to write down in prune.json.
        progress: told each tensor's name.
        quantize: makes NF4 of the matrices of decoder linears; None leaves them as they are.

    Raises:
        InputError: a matrix to quantise holds NaN or infinity.
    """
    config = pruned_config(config, weights.small_spec)
    stored = InNF4(weights, quantize) if quantize else weights
    if quantize:
        config["quantization_config"] = QUANTISATION

    def read(name: str) -> Tensor:
        progress(name)
        return stored.read(name)

    layout = {name: (stored.dtype(name), stored.shape(name)) for name in stored.names()}
    with atomic_folder(target) as tmp:
        if source:
            copy_companions(source, tmp)
        write_shards(tmp, layout, read)
        write_json(tmp / "config.json", config)
        write_keep(tmp / KEEP, weights.keep)
        write_json(tmp / CUT_FACTS, facts())
