"""What cannot be had together. Each rule is a condition and what is said of it, beside the others of its concern."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from effitrain.core.methods import SAMPLED, WEIGHTS
from effitrain.core.names import flag_of

# How a small model is made.
MADE_BY = (
    "prune_parts", "prune_score", "prune_ranking", "prune_round", "prune_exempt", "align", "calib_dataset",
)  # fmt: skip


def contradictions(recipe: Any) -> Iterator[str]:
    """Of a ``Recipe``, fields that cannot both be had, and given ones that nothing would read."""
    concerns: tuple[Callable[[Any], Iterator[str]], ...] = (_memory, _data, _context, _pruning, _weights, _turns)
    for concern in concerns:
        yield from concern(recipe)


def _memory(recipe: Any) -> Iterator[str]:
    lean, tiled = recipe.recompute in ("auto", "layer"), (recipe.mlp_tiles or 1) > 1
    if recipe.offload_activations == "on" and not lean:
        yield f"--offload-activations on keeps layer inputs alone, and --recompute {recipe.recompute} keeps more."
    if recipe.fit == "stream" and not lean:
        yield f"--fit stream computes each layer again, and --recompute {recipe.recompute} does not."
    if recipe.resident_layers is not None and recipe.fit not in ("auto", "stream", "prune"):
        yield f"--resident-layers is for models that stream, and --fit is {recipe.fit}."
    if recipe.stream_order != "auto" and recipe.fit == "resident":
        yield f"--stream-order {recipe.stream_order} is for models that stream, and --fit is resident."
    if tiled and not lean:
        yield f"--mlp-tiles computes layers again, and --recompute {recipe.recompute} keeps more of them."
    if tiled and recipe.lora_dropout:
        yield "--mlp-tiles would drop the same elements in every tile: leave out --lora-dropout."
    if tiled and recipe.method in WEIGHTS:
        yield f"--mlp-tiles is for adapters, and --method {recipe.method} trains weights."


def _data(recipe: Any) -> Iterator[str]:
    if recipe.join_documents and recipe.packing:
        yield "--packing keeps samples apart, and --join-documents lets them see each other."
    if recipe.join_documents and recipe.format not in ("auto", "text"):
        yield f"--join-documents is for running text, and --format is {recipe.format}."


def _context(recipe: Any) -> Iterator[str]:
    if recipe.s2_group is not None and recipe.attention != "s2":
        yield f"--s2-group {recipe.s2_group} is for --attention s2, and --attention is {recipe.attention}."
    if recipe.rope_factor is not None and recipe.rope_scaling == "none":
        yield f"--rope-factor {recipe.rope_factor:g} scales positions, and --rope-scaling none leaves them alone."


def _pruning(recipe: Any) -> Iterator[str]:
    if recipe.fit not in ("auto", "prune"):
        for field in given(recipe, recipe.fields_in("pruning")):
            yield f"{flag_of(field)} {getattr(recipe, field)} is for --fit prune, and --fit is {recipe.fit}."
    if recipe.small_model:
        for field in given(recipe, MADE_BY):
            yield f"{flag_of(field)} is for pruning, and --small-model {recipe.small_model} is pruned already."
    if recipe.prune_method == "loraprune":
        for field in given(recipe, ("train_norms", "train_embeddings")):
            yield f"{flag_of(field)} saves them with an adapter; --prune-method loraprune ships a whole model."
        for field in given(recipe, ("prune_score", "prune_ranking", "align", "calib_dataset", "small_model")):
            yield f"{flag_of(field)} is for --prune-method loram; loraprune scores by its own gradients."
        if recipe.method != "lora":
            yield f"--prune-method loraprune reads the gradients of a LoRA, and --method is {recipe.method}."
    if recipe.asks_to_prune:
        if recipe.method in WEIGHTS:
            yield f"--method {recipe.method} changes the model itself, and from a pruned one nothing can be recovered."
        elif recipe.method in SAMPLED:
            yield (
                f"--method {recipe.method} trains layers by turns in the same memory, and those of a pruned model"
                " differ."
            )


def _weights(recipe: Any) -> Iterator[str]:
    """Of methods that train the model's own weights."""
    method = recipe.method
    if method in WEIGHTS:
        read = ("method", "lora_r") if method == "lisa-delta" else ("method",)
        for field in given(recipe, recipe.fields_in("adapter")):
            if field not in read:
                yield f"{flag_of(field)} is for adapters, and --method {method} trains weights."
    if method == "full" and recipe.quant != "none":
        yield f"--method full trains every weight, and --quant {recipe.quant} freezes them; use --quant none."
    if method == "full" and (recipe.fit == "stream" or recipe.resident_layers is not None):
        yield "--method full changes every weight in every step, and layers that stream are never copied back."


def _turns(recipe: Any) -> Iterator[str]:
    """Of methods that train a few layers at a time."""
    method = recipe.method
    if method not in SAMPLED:
        for field in given(recipe, recipe.fields_in("lisa")):
            yield f"{flag_of(field)} is for --method {', '.join(SAMPLED)}, and --method is {method}."
        return
    if method != "lisa" and recipe.lisa_train_embeddings:
        yield f"--lisa-train-embeddings is for --method lisa; {method} leaves an adapter of decoder linears."
    if recipe.optimizer == "paged-adamw8bit":
        yield "--optimizer paged-adamw8bit keeps the states of layers that LISA lets go; use adamw8bit."
    if recipe.lisa_state == "keep-host" and recipe.optimizer == "adamw8bit":
        yield "--lisa-state keep-host keeps 32-bit states, and --optimizer is adamw8bit."
    if method == "lisa-lora":
        for field in given(recipe, ("train_norms", "train_embeddings")):
            yield f"{flag_of(field)} trains in every step, and --method lisa-lora a few layers at a time."


def given(recipe: Any, fields: Iterable[str]) -> list[str]:
    """Those of ``fields`` that are not as they are when left out."""
    return [field for field in fields if getattr(recipe, field) != type(recipe).model_fields[field].default]
