"""What each ``--method`` trains, and what it cannot be combined with."""

from collections.abc import Iterable, Iterator
from typing import Any

WEIGHTS = ("full", "lisa", "lisa-delta")  # train weights of the model itself, with float32 masters
SAMPLED = ("lisa", "lisa-lora", "lisa-delta")  # train a few layers at a time
METHODS = ("full", *SAMPLED)  # besides the adapter kinds
CHANGES_MODEL = ("full", "lisa")  # leave a model, not an adapter
DEFAULTS = {"full": {"quant": "none"}}  # fields that a method has other defaults for
ADAPTER_LR, WEIGHTS_LR = 2e-4, 1e-5
LORA_FIELDS = ("lora_r", "lora_alpha", "lora_dropout", "lora_targets", "lora_rslora", "init_adapter", "train_norms",
               "train_embeddings")  # fmt: skip
LISA_FIELDS = ("lisa_layers", "lisa_interval", "lisa_state", "lisa_sampling", "lisa_train_embeddings")


def adapter_kind(method: str) -> str | None:
    """The adapters that lie on the linears; None where there are none."""
    if method in CHANGES_MODEL:
        return None
    return "lora" if method in SAMPLED else method


def default_lr(method: str) -> float:
    """Peak learning rate where none is given."""
    return WEIGHTS_LR if method in WEIGHTS else ADAPTER_LR


def contradictions(recipe: Any) -> Iterator[str]:
    """Fields of a recipe that its method cannot use."""
    method = recipe.method
    if method in WEIGHTS:
        fields = [field for field in LORA_FIELDS if (method, field) != ("lisa-delta", "lora_r")]
        yield from _given(recipe, fields, f"is for adapters, and --method {method} trains weights.")
        if (recipe.mlp_tiles or 1) > 1:
            yield f"--mlp-tiles is for adapters, and --method {method} trains weights."
        if recipe.fit == "prune" or recipe.prune_ratio is not None:
            yield f"--method {method} changes the model itself, and from a pruned one nothing can be recovered."
    elif method in SAMPLED and (recipe.fit == "prune" or recipe.prune_ratio is not None):
        yield f"--method {method} trains layers by turns in the same memory, and those of a pruned model differ."
    if method == "full":
        if recipe.quant != "none":
            yield f"--method full trains every weight, and --quant {recipe.quant} freezes them; use --quant none."
        if recipe.fit == "stream" or recipe.resident_layers is not None:
            yield "--method full changes every weight in every step, and layers that stream are never copied back."
    if method in SAMPLED:
        yield from _of_lisa(recipe)
        if method == "lisa-lora":
            beside = ("train_norms", "train_embeddings")
            yield from _given(recipe, beside, "trains in every step, and --method lisa-lora a few layers at a time.")
    else:
        yield from _given(recipe, LISA_FIELDS, f"is for --method {', '.join(SAMPLED)}, and --method is {method}.")


def _of_lisa(recipe: Any) -> Iterator[str]:
    if recipe.method != "lisa" and recipe.lisa_train_embeddings:
        yield f"--lisa-train-embeddings is for --method lisa; {recipe.method} leaves an adapter of decoder linears."
    if recipe.optimizer == "paged-adamw8bit":
        yield "--optimizer paged-adamw8bit keeps the states of layers that LISA lets go; use adamw8bit."
    if recipe.lisa_state == "keep-host" and recipe.optimizer == "adamw8bit":
        yield "--lisa-state keep-host keeps 32-bit states, and --optimizer is adamw8bit."


def _given(recipe: Any, fields: Iterable[str], why: str) -> Iterator[str]:
    for field in fields:
        if getattr(recipe, field) != type(recipe).model_fields[field].default:
            yield f"--{field.replace('_', '-')} {why}"
