"""The model families that are handled: what their config.json files say, and what they leave unsaid."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from effitrain.core.errors import InputError


@dataclass(frozen=True)
class Family:
    """What a family's config leaves unsaid (transformers' own defaults); ``*_bias``: always, never, or a config key."""

    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    head_dim: int | None = None
    tied: bool = False


FAMILIES = {
    "llama": Family(qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
    "mistral": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qkv_bias="attention_bias", o_bias="attention_bias", qk_norm=True, head_dim=128),
    "gemma": Family(qkv_bias="attention_bias", o_bias="attention_bias", head_dim=256, tied=True),
}
_HANDLED = "Llama, Mistral, Qwen2, Qwen2.5, Qwen3 and Gemma (first version), dense"
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
          "max_position_embeddings")  # fmt: skip


def family_of(config: Mapping[str, Any], name: str) -> Family:
    """The family of the model that ``config`` describes.

    Raises:
        InputError: a mixture of experts, or a family not handled.
    """
    model_type = config.get("model_type")
    handled = f"Handled: {_HANDLED}."
    experts = [key for key in _EXPERT_KEYS if config.get(key)]
    if experts:
        raise InputError(
            f"{name} is a mixture of experts ({experts[0]} = {config[experts[0]]}).",
            "This version trains dense models only.",
            handled,
        )
    if not isinstance(model_type, str):
        raise InputError(f"The config of {name} has no model_type.", "It may not be one of transformers.", handled)
    if model_type not in FAMILIES:
        raise InputError(
            f"{name} is of the family {model_type!r}, which this version does not handle.", next_step=handled
        )
    return FAMILIES[model_type]


def read_sizes(config: Mapping[str, Any], family: Family, name: str) -> dict[str, int]:
    """The sizes by ModelSpec's field names, and num_layers.

    Raises:
        InputError: sizes are missing or do not go together; names all of them.
    """
    values: dict[str, Any] = {key: config.get(key) for key in _SIZES}
    kv_heads = config.get("num_key_value_heads")
    # Llama configs older than grouped heads do not name them; every other family always does.
    values["num_key_value_heads"] = (
        values["num_attention_heads"] if kv_heads is None and config["model_type"] == "llama" else kv_heads
    )
    head_dim = config.get("head_dim")
    if head_dim is not None or family.head_dim is not None:
        values["head_dim"] = family.head_dim if head_dim is None else head_dim
    problems = [_problem(key, value) for key, value in values.items() if not is_size(value)]
    problems = problems or _mismatches(values)
    if problems:
        raise InputError(
            f"The config of {name} cannot be used: {'; '.join(problems)}.", next_step="Check its config.json."
        )
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    return {
        "hidden": hidden,
        "ffn": values["intermediate_size"],
        "num_heads": heads,
        "num_kv_heads": values["num_key_value_heads"],
        "head_dim": values.get("head_dim", hidden // heads),
        "vocab": values["vocab_size"],
        "max_positions": values["max_position_embeddings"],
        "num_layers": values["num_hidden_layers"],
    }


def is_size(value: Any) -> bool:
    """Whether ``value`` counts something."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _problem(key: str, value: Any) -> str:
    return f"{key} is missing" if value is None else f"{key} must be a whole number above 0, not {value!r}"


def _mismatches(values: Mapping[str, Any]) -> list[str]:
    hidden, heads, kv_heads = values["hidden_size"], values["num_attention_heads"], values["num_key_value_heads"]
    problems = []
    if heads % kv_heads:
        problems.append(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if "head_dim" not in values and hidden % heads:
        problems.append(
            f"head_dim is missing and hidden_size {hidden} is not a multiple of num_attention_heads {heads}"
        )
    return problems
