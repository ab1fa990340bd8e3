"""Fill an empty model from a checkpoint, one tensor at a time, quantising on the way."""

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effitrain.core.blobs import SLOTS
from effitrain.core.errors import InputError
from effitrain.core.paths import EMBEDDING, HEAD, path_of
from effitrain.core.placement import Placement, place
from effitrain.core.positions import with_positions_of
from effitrain.core.recipe import Recipe
from effitrain.core.spec import ModelSpec, spec_from_config
from effitrain.core.weights import returning_bytes
from effitrain.io.checkpoint import open_checkpoint
from effitrain.io.hub import (
    ModelSource,
    check_weights,
    fetch_small,
    fetch_weights,
    find_model,
    is_local,
    revision_of,
)
from effitrain.io.shards import hub_fingerprint, open_on_hub
from effitrain.io.store import Store, StoreKey, find_store
from effitrain.io.stores import default_store_dir
from effitrain.io.synthetic import SyntheticCheckpoint, shapes_of
from effitrain.io.tokenizer import load_tokenizer
from effitrain.model.decoder import Decoder, build
from effitrain.quant.linear import FrozenLinear
from effitrain.quant.read import DTYPES, Weights, read_dense, read_frozen
from effitrain.stream.build import ensure_store
from effitrain.stream.fresh import FreshLayers
from effitrain.stream.host import HostLayers, LayerSource
from effitrain.stream.streamer import Streamer

# Threads of a small model wait for each other more than they compute, and on shared cores they wait for those of other
# programs: the built-in model (hidden size 128) trained 94 to 2,200 tokens/s on two busy cores, 2,200 on one of them.
ONE_THREAD_BELOW = 512  # hidden size


@dataclass(frozen=True)
class Base:
    """A base model that can be had.

    Attributes:
        source: where it was found.
        spec: its shape.
        synthetic_seed: of random weights in place of its own; None for its own.
        remote: where the weights are when only the hub has them, with the commit.
    """

    source: ModelSource
    spec: ModelSpec
    synthetic_seed: int | None
    remote: ModelSource | None = None

    @property
    def name(self) -> str:
        """What adapters name as their base: the hub id, or the folder or preset as the user wrote it."""
        return self.source.hub_id or self.source.name

    def fetched(self) -> "Base":
        """The same with its files on disk; downloads what is missing."""
        if self.synthetic_seed is not None:
            return self
        return replace(self, source=replace(self.source, folder=fetch_weights(self.source)))

    def to_stream(self) -> "Base":
        """The same with its config and tokenizer on disk; weights that are on the hub alone stay there until their
        store is built, one file at a time.
        """
        if self.synthetic_seed is not None or is_local(self.source):
            return self.fetched()
        remote = replace(self.source, revision=revision_of(self.source))
        return replace(self, source=replace(remote, folder=fetch_small(remote)), remote=remote)

    def weights(self, quant: str = "none", dtype: torch.dtype = torch.float32) -> Weights:
        """Its tensors; ``quant`` and ``dtype`` say in which form synthetic ones are made."""
        if self.synthetic_seed is not None:
            return SyntheticCheckpoint(shapes_of(self.spec), self.synthetic_seed, quant == "nf4", dtype)
        return open_checkpoint(self.folder)

    def fingerprint(self) -> str:
        """Changes when the weights do."""
        return hub_fingerprint(self.remote) if self.remote else self.weights().fingerprint()

    def at_positions(self, config: Mapping[str, Any]) -> "Base":
        """The same with the positions of ``config``, a config.json of this model or of one cut from it."""
        source = replace(self.source, config=with_positions_of(config, self.source.config))
        return replace(self, source=source, spec=spec_from_config(source.config, source.name))

    @property
    def folder(self) -> Path:
        """Where its files are."""
        assert self.source.folder is not None
        return self.source.folder

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
    base: Base,
    recipe: Recipe,
    device: torch.device,
    progress: Callable[[str], None] = lambda name: None,
    placement: Placement | None = None,
    stored: Callable[[int, int], None] = lambda done, parts: None,
) -> Decoder:
    """Build and fill the model as ``recipe`` (resolved) says; on a card an untied embedding stays in host memory.

    On a CPU a small model sets torch to one thread, unless OMP_NUM_THREADS says how many.

    Args:
        base: with its files on disk.
        recipe: with every choice made.
        device: where to.
        progress: told each layer that is in place.
        placement: which layers only visit the device; None puts all of them there for good.
        stored: told how many parts of the store are done, of how many, while it is built.

    Raises:
        InputError: the weights are damaged or of another shape, or their store cannot be built.
    """
    settle_threads(base.spec, device)
    dtype = DTYPES[recipe.dtype]
    decoder = build(base.spec, base.source.config, base.name)
    host_embedding = device.type == "cuda" and not base.spec.tied
    room = returning_bytes(base.spec, recipe, recipe.dtype)
    if placement is None:
        weights = base.weights(recipe.quant, dtype)
        fill(decoder, weights, recipe.quant, dtype, device, host_embedding, progress)
        source = FreshLayers(base.spec, weights, recipe.quant, recipe.dtype, device)
        return stream(decoder, source, place(base.spec.num_layers, base.spec.num_layers), device, slot_bytes=room)
    weights, layers = _streamable(base, recipe, placement, device, stored)
    fill(decoder, weights, recipe.quant, dtype, device, host_embedding, progress, placement.streamed)
    return stream(decoder, layers, placement, device, progress, slot_bytes=room)


def settle_threads(spec: ModelSpec, device: torch.device) -> None:
    """One thread for a small model on a CPU, unless OMP_NUM_THREADS says how many. Whoever computes with a model asks
    first: sums are cut up by threads, so the same stage in another process would else round in another way.
    """
    if device.type == "cpu" and spec.hidden < ONE_THREAD_BELOW and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def _streamable(
    base: Base, recipe: Recipe, placement: Placement, device: torch.device, stored: Callable[[int, int], None]
) -> tuple[Weights, LayerSource]:
    """The weights of ``base``, and the same as a source of whole layers: its store, or synthetic ones made on the way.

    Raises:
        InputError: synthetic weights do not fit host memory.
    """
    if base.synthetic_seed is None:
        store = _store(base, recipe, device, stored)
        return store, store
    if placement.on_disk:
        raise InputError(
            f"{len(placement.on_disk)} layers do not fit host memory, and synthetic weights have no place on disk.",
            next_step="Raise --host-mem, or plan alone with `effitrain plan`.",
        )
    weights = base.weights(recipe.quant, DTYPES[recipe.dtype])
    return weights, FreshLayers(base.spec, weights, recipe.quant, recipe.dtype, device)


def _store(base: Base, recipe: Recipe, device: torch.device, stored: Callable[[int, int], None]) -> Store:
    """The store of ``base``, built when it is not there."""
    root = default_store_dir()
    origin = f"{base.remote.hub_id}@{base.remote.revision}" if base.remote else ""
    key = StoreKey(base.name, base.fingerprint(), recipe.quant, recipe.dtype, device.type, origin)
    if base.remote is None:
        return ensure_store(root, key, base.spec, open_checkpoint(base.folder), stored, device)
    found = find_store(root, key)
    if found is None:
        on_hub = open_on_hub(base.remote, root / ".shards")
        found = ensure_store(root, key, base.spec, on_hub, stored, device)
        on_hub.close()
    return found


def stream(
    decoder: Decoder,
    source: LayerSource,
    placement: Placement,
    device: torch.device,
    progress: Callable[[str], None] = lambda name: None,
    bytes_per_second: float | None = None,
    shapes_only: bool = False,
    slot_bytes: int = 0,
) -> Decoder:
    """Let the layers that ``fill`` left out visit the device, from ``source``.

    Args:
        decoder: filled, without adapters or with them; returned.
        source: of whole layers.
        placement: which layers, and where they wait.
        device: where they compute.
        progress: told each layer's name when it waits where it should.
        bytes_per_second: on a CPU, the speed of the link to imitate.
        shapes_only: copy nothing, for steps that are run on fake tensors.
        slot_bytes: room of a slot for layers that are to stream in another form later.
    """
    held = () if shapes_only else placement.in_host_memory
    host = HostLayers(source, held, device, lambda layer: progress(path_of(layer)))
    for layer in sorted(placement.on_disk):
        progress(path_of(layer))
    linears = {layer: frozen_linears(decoder.layers[layer]) for layer in placement.streamed}
    if linears or slot_bytes:
        slots = SLOTS if slot_bytes else placement.slots
        decoder.attach_streamer(Streamer(linears, host, slots, device, bytes_per_second, shapes_only, slot_bytes))
    return decoder


def frozen_linears(module: nn.Module) -> list[FrozenLinear]:
    """The frozen linears in ``module``."""
    return [linear for linear in module.modules() if isinstance(linear, FrozenLinear)]


def fill(
    decoder: Decoder,
    weights: Weights,
    quant: str,
    dtype: torch.dtype,
    device: torch.device,
    host_embedding: bool = False,
    progress: Callable[[str], None] = lambda name: None,
    streamed: Collection[int] = (),
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
        streamed: layers whose linears get biases and no weights.

    Raises:
        InputError: a tensor is missing, has another shape, or holds NaN or infinity.
    """

    def dense(name: str, shape: tuple[int, ...], where: torch.device = device) -> Tensor:
        return read_dense(weights, name, shape, dtype, where)

    spec, model = decoder.spec, decoder.model
    table = (spec.vocab, spec.hidden)
    embedding: Any = model.embed_tokens
    embedding.device = device
    embedding.weight = dense(EMBEDDING, table, torch.device("cpu") if host_embedding else device)
    head = decoder.lm_head
    assert isinstance(head, FrozenLinear)
    head.weight = embedding.weight.to(device) if spec.tied else dense(HEAD, table)
    for index in range(len(decoder.layers)):
        fill_layer(decoder, index, weights, quant, dtype, device, index in streamed)
        if index not in streamed:
            progress(path_of(index))
    fill_norm(decoder, weights, dtype, device)
    return decoder


def fill_layer(
    decoder: Decoder,
    index: int,
    weights: Weights,
    quant: str,
    dtype: torch.dtype,
    device: torch.device,
    streamed: bool = False,
) -> None:
    """Give one layer, adapted or not, its weights; arguments and errors as for ``fill``."""

    def dense(name: str, shape: tuple[int, ...]) -> Tensor:
        return read_dense(weights, name, shape, dtype, device)

    layer = decoder.layers[index]
    for linear in frozen_linears(layer):
        name, shape = path_of(index, linear.spec.name), (linear.out_features, linear.in_features)
        if not streamed:
            linear.weight = read_frozen(weights, f"{name}.weight", shape, quant, dtype, device)
        if linear.spec.bias:
            linear.bias = dense(f"{name}.bias", shape[:1])
    _fill_parameters(layer, path_of(index, ""), dense)


def fill_norm(decoder: Decoder, weights: Weights, dtype: torch.dtype, device: torch.device) -> None:
    """Give the decoder its last norm and its rotary tables, which are computed and not stored."""
    norm, rotary = (getattr(decoder.model, name) for name in ("norm", "rotary_emb"))
    _fill_parameters(norm, "model.norm.", lambda name, shape: read_dense(weights, name, shape, dtype, device))
    decoder.model.rotary_emb = type(rotary)(config=decoder.config).to(device)


def _fill_parameters(module: nn.Module, prefix: str, dense: Callable[[str, tuple[int, ...]], Tensor]) -> None:
    for name, parameter in list(module.named_parameters()):
        if parameter.is_meta:
            path, _, leaf = name.rpartition(".")
            filled = nn.Parameter(dense(prefix + name, tuple(parameter.shape)), requires_grad=False)
            setattr(module.get_submodule(path), leaf, filled)
