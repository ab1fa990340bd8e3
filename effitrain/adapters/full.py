"""Norms and token embedding trained in full beside the adapters (LongLoRA, Chen et al. 2023, section 3.3).

They are float32 parameters that are cast where they are used: steps at small rates would vanish in half precision. They
are saved with the adapter under their own names, as peft's ``modules_to_save``.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from effitrain.core.errors import InputError
from effitrain.core.paths import EMBEDDING, NORM, layer_of
from effitrain.core.recipe import Recipe
from effitrain.core.spec import ModelSpec
from effitrain.model.decoder import Decoder
from effitrain.model.embedding import Embedding, RowTable
from effitrain.model.trained import master


def train_in_full(decoder: Decoder, norms: bool, embeddings: bool) -> None:
    """Make the norms, all of them, or the rows of the token embedding trainable, or both."""
    if norms:
        for module in _norms(decoder).values():
            module.weight = master(module.weight)
    if embeddings:
        _embedding(decoder).train_rows()


def trained_in_full(decoder: Decoder) -> dict[str, Tensor]:
    """The trained tensors that belong to no adapter, by their path in the model."""
    found = {f"{name}.weight": module.weight for name, module in _norms(decoder).items() if module.weight.requires_grad}
    table = _embedding(decoder).weight
    return {**found, EMBEDDING: table} if isinstance(table, RowTable) else found


@torch.no_grad()
def load_in_full(decoder: Decoder, tensors: Mapping[str, Tensor]) -> None:
    """Put saved tensors in the place of the model's own, trained ones or frozen; a tied head keeps what it has.

    Raises:
        InputError: they are of another model.
    """
    check_full(decoder.spec, tensors)
    trained, like = trained_in_full(decoder), _norms(decoder)["model.norm"].weight
    embedding = _embedding(decoder)
    for name, tensor in tensors.items():
        if name in trained:
            trained[name].copy_(tensor)
        elif name == EMBEDDING:
            where = torch.device("cpu") if embedding.weight is None else embedding.weight.device
            embedding.weight = tensor.to(where, like.dtype)
        else:
            frozen = nn.Parameter(tensor.to(like.device, like.dtype), requires_grad=False)
            decoder.get_submodule(name.removesuffix(".weight")).weight = frozen


def check_kept(names: Iterable[str], recipe: Recipe) -> None:
    """Refuse a run that goes on from an adapter beside which these were trained, and does not train them: it would lose
    them.

    Raises:
        InputError: names the flags that are missing.
    """
    trained = {"--train-norms": recipe.train_norms, "--train-embeddings": recipe.train_embeddings}
    parts = sorted({"--train-embeddings" if name == EMBEDDING else "--train-norms" for name in names})
    lost = [part for part in parts if not trained[part]]
    if lost:
        raise InputError(
            f"{recipe.init_adapter} holds more than an adapter, which this run would lose.",
            f"It was trained with {' and '.join(parts)}.",
            f"Add {' and '.join(lost)}.",
        )


def check_full(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors of another model.

    Raises:
        InputError: there is no such norm or embedding, or it has another shape.
    """
    for name, tensor in tensors.items():
        if (wanted := full_shape(spec, name)) != tuple(tensor.shape):
            raise InputError(
                f"The adapter holds {name} of shape {tuple(tensor.shape)}; {spec.name} has {wanted or 'no such'}.",
                "It was trained on another model.",
                "Name that one with --model.",
            )


def full_shape(spec: ModelSpec, name: str) -> tuple[int, ...] | None:
    """The shape of a norm or of the embedding; None for any other name."""
    if name == EMBEDDING:
        return spec.vocab, spec.hidden
    if name == NORM:
        return (spec.hidden,)
    known = {"input_layernorm": spec.hidden, "post_attention_layernorm": spec.hidden}
    if spec.qk_norm:
        known |= {"q_norm": spec.head_dim, "k_norm": spec.head_dim}
    layer, norm = layer_of(name), name.removesuffix(".weight").rpartition(".")[2]
    if layer is not None and layer < spec.num_layers and norm in known:
        return (known[norm],)
    return None


def _embedding(decoder: Decoder) -> Embedding:
    module = decoder.model.embed_tokens
    assert isinstance(module, Embedding)
    return module


def _norms(decoder: Decoder) -> dict[str, Any]:
    """Every norm by its path."""
    return {name: module for name, module in decoder.named_modules() if name.endswith("norm")}
