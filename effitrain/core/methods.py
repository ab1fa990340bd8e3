"""What each ``--method`` trains, and what it cannot be combined with."""

from collections.abc import Iterable, Iterator
from typing import Any

METHODS = ("full",)  # besides the adapter kinds
WEIGHTS = ("full",)  # those that train weights of the model itself, with float32 masters
DEFAULTS = {"full": {"quant": "none"}}  # fields that a method has other defaults for
ADAPTER_LR, WEIGHTS_LR = 2e-4, 1e-5
LORA_FIELDS = ("lora_r", "lora_alpha", "lora_dropout", "lora_targets", "lora_rslora", "init_adapter", "train_norms",
               "train_embeddings")  # fmt: skip


def adapter_kind(method: str) -> str | None:
    """The adapters that lie on the linears; None where there are none."""
    return None if method in METHODS else method


def default_lr(method: str) -> float:
    """Peak learning rate where none is given."""
    return WEIGHTS_LR if method in WEIGHTS else ADAPTER_LR


def contradictions(recipe: Any) -> Iterator[str]:
    """Fields of a recipe that its method cannot use."""
    method = recipe.method
    if method in WEIGHTS:
        yield from _given(recipe, LORA_FIELDS, f"is for adapters, and --method {method} trains weights.")
        if (recipe.mlp_tiles or 1) > 1:
            yield f"--mlp-tiles is for adapters, and --method {method} trains weights."
        if recipe.fit == "prune" or recipe.prune_ratio is not None:
            yield f"--method {method} changes the model itself, and from a pruned one nothing can be recovered."
    if method == "full":
        if recipe.quant != "none":
            yield f"--method full trains every weight, and --quant {recipe.quant} freezes them; use --quant none."
        if recipe.fit == "stream" or recipe.resident_layers is not None:
            yield "--method full changes every weight in every step, and layers that stream are never copied back."


def _given(recipe: Any, fields: Iterable[str], why: str) -> Iterator[str]:
    for field in fields:
        if getattr(recipe, field) != type(recipe).model_fields[field].default:
            yield f"--{field.replace('_', '-')} {why}"
