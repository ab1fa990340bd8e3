"""Fill an empty model from a checkpoint, one tensor at a time, quantising on the way."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from effitrain.core.errors import InputError
from effitrain.core.recipe import Recipe
from effitrain.core.spec import ModelSpec, spec_from_config
from effitrain.io.checkpoint import open_checkpoint
from effitrain.io.hub import ModelSource, check_weights, fetch_weights, find_model
from effitrain.io.nf4 import NF4Tensor
from effitrain.io.synthetic import SyntheticCheckpoint, shapes_of
from effitrain.io.tokenizer import load_tokenizer
from effitrain.model.decoder import Decoder, Embedding, build
from effitrain.quant.linear import FrozenLinear
from effitrain.quant.nf4 import quantize


class Weights(Protocol):
    """A source of named tensors: a checkpoint on disk or synthetic weights. What is ``trusted`` holds no NaN."""

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


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Base:
    """A base model that can be had.

    Attributes:
        source: where it was found.
        spec: its shape.
        synthetic_seed: of random weights in place of its own; None for its own.
    """

    source: ModelSource
    spec: ModelSpec
    synthetic_seed: int | None

    @property
    def name(self) -> str:
        """What adapters name as their base: the hub id, or the folder or preset as the user wrote it."""
        return self.source.hub_id or self.source.name

    def fetched(self) -> "Base":
        """The same with its files on disk; downloads what is missing."""
        if self.synthetic_seed is not None:
            return self
        return replace(self, source=replace(self.source, folder=fetch_weights(self.source)))

    def weights(self, quant: str = "none", dtype: torch.dtype = torch.float32) -> Weights:
        """Its tensors; ``quant`` and ``dtype`` say in which form synthetic ones are made."""
        if self.synthetic_seed is not None:
            return SyntheticCheckpoint(shapes_of(self.spec), self.synthetic_seed, quant == "nf4", dtype)
        assert self.source.folder is not None
        return open_checkpoint(self.source.folder)

    def tokenizer(self) -> Any:
        """Its tokenizer; the built-in one for synthetic weights of a model that is not here."""
        return load_tokenizer(self.source)


def find_base(name: str, synthetic: str | None = None) -> Base:
    """A model whose weights can be had, by preset, folder or hub id; nothing large is read or downloaded.

    Args:
        name: preset, folder or hub id.
        synthetic: ``synthetic[:SEED]`` for random weights of the model's shape.

    Raises:
        InputError: no such model, its weights cannot be had, or its architecture is not handled.
    """
    source = find_model(name)
    spec = spec_from_config(source.config, name)
    if synthetic:
        return Base(source, spec, int(synthetic.partition(":")[2] or 0))
    check_weights(source)
    return Base(source, spec, None)


def load_model(
    base: Base, recipe: Recipe, device: torch.device, progress: Callable[[str], None] = lambda name: None
) -> Decoder:
    """Build and fill the model as ``recipe`` (resolved) says; on a card an untied embedding stays in host memory."""
    dtype = DTYPES[recipe.dtype]
    decoder = build(base.spec, base.source.config, base.name)
    host_embedding = device.type == "cuda" and not base.spec.tied
    return fill(decoder, base.weights(recipe.quant, dtype), recipe.quant, dtype, device, host_embedding, progress)


def fill(
    decoder: Decoder,
    weights: Weights,
    quant: str,
    dtype: torch.dtype,
    device: torch.device,
    host_embedding: bool = False,
    progress: Callable[[str], None] = lambda name: None,
) -> Decoder:
    """Give every module its weights: linears in NF4 or ``dtype``, all else in ``dtype``, on ``device``.

    Args:
        decoder: from ``build``; filled in place and returned.
        weights: where the tensors come from.
        quant: ``nf4`` or ``none`` for the decoder's linears. Weights stored in NF4 are taken as they are.
        dtype: compute dtype.
        device: where the layers live.
        host_embedding: leave the token embedding in host memory and gather rows there.
        progress: told each layer's name when it is in place.

    Raises:
        InputError: a tensor is missing, has another shape, or holds NaN or infinity.
    """

    filling = Filling(weights, quant, dtype, device)
    filling.embedding(decoder, host_embedding)
    filling.head(decoder)
    for index in range(len(decoder.layers)):
        filling.layer(decoder, index)
        progress(f"model.layers.{index}")
    filling.rest(decoder)
    return decoder


@dataclass(frozen=True)
class Filling:
    """Gives modules their weights, part by part, under the arguments and errors of ``fill``."""

    weights: Weights
    quant: str
    dtype: torch.dtype
    device: torch.device

    def embedding(self, decoder: Decoder, on_host: bool) -> None:
        """The token embedding."""
        table = decoder.model.embed_tokens
        assert isinstance(table, Embedding)
        where = torch.device("cpu") if on_host else self.device
        table.device = self.device
        table.weight = self.dense("model.embed_tokens.weight", (decoder.spec.vocab, decoder.spec.hidden), where)

    def head(self, decoder: Decoder) -> None:
        """The head; where it is tied, the embedding that is in place or a copy of it."""
        spec, embedding = decoder.spec, decoder.model.embed_tokens
        assert isinstance(embedding, Embedding)
        name = "model.embed_tokens.weight" if spec.tied else "lm_head.weight"
        if spec.tied and embedding.weight is not None:
            table = embedding.weight.to(self.device)
        else:
            table = self.dense(name, (spec.vocab, spec.hidden))
        frozen(decoder.lm_head).weight = table

    def layer(self, decoder: Decoder, index: int) -> None:
        """One decoder layer, adapted or not."""
        prefix, layer = f"model.layers.{index}.", decoder.layers[index]
        for linear in decoder.spec.layers[index].linears:
            _fill_linear(frozen(layer.get_submodule(linear.name)), prefix + linear.name, self)
        self._parameters(layer, prefix)

    def rest(self, decoder: Decoder) -> None:
        """The final norm, and the rotary tables, which are computed and not stored."""
        self._parameters(decoder.model.norm, "model.norm.")  # type: ignore[arg-type]
        rotary: Any = decoder.model.rotary_emb
        decoder.model.rotary_emb = type(rotary)(config=decoder.config).to(self.device)

    def dense(self, name: str, shape: tuple[int, ...], device: torch.device | None = None) -> Tensor:
        """One tensor in the compute dtype, checked."""
        tensor = self.weights.read(name, self.device if device is None else device)
        if tuple(tensor.shape) != shape:
            raise InputError(
                f"{name} has the shape {tuple(tensor.shape)}, and config.json asks for {shape}.",
                "The checkpoint and its config.json do not belong together.",
            )
        if not self.weights.trusted and not _finite(tensor):
            raise InputError(f"{name} holds NaN or infinite values.", "The checkpoint is damaged.")
        return tensor.to(self.dtype)

    def _parameters(self, module: nn.Module, prefix: str) -> None:
        for name, parameter in list(module.named_parameters()):
            if parameter.is_meta:
                path, _, leaf = name.rpartition(".")
                filled = nn.Parameter(self.dense(prefix + name, tuple(parameter.shape)), requires_grad=False)
                setattr(module.get_submodule(path), leaf, filled)


def _finite(tensor: Tensor) -> bool:
    """The sum tells nearly always, without a tensor of the same size."""
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32)) or torch.isfinite(tensor).all())


def frozen(module: nn.Module) -> FrozenLinear:
    """The frozen linear that ``module`` is, or that an adapter wraps."""
    return next(inner for inner in module.modules() if isinstance(inner, FrozenLinear))


def _fill_linear(linear: FrozenLinear, name: str, filling: Filling) -> None:
    shape = (linear.out_features, linear.in_features)
    if filling.weights.is_nf4(f"{name}.weight"):
        stored = filling.weights.read_nf4(f"{name}.weight", filling.device)
        if tuple(stored.shape) != shape:
            raise InputError(f"{name}.weight has the shape {stored.shape}, and config.json asks for {shape}.")
        linear.weight = stored
    else:
        full = filling.dense(f"{name}.weight", shape)
        linear.weight = quantize(full) if filling.quant == "nf4" else full
    if linear.spec.bias:
        linear.bias = filling.dense(f"{name}.bias", (linear.out_features,))
