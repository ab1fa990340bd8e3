from typing import Any

import pytest

from effitrain.core.errors import InputError
from effitrain.core.spec import Axis, LayerSpec, LinearSpec, ModelSpec, spec_from_config

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 261,
    "max_position_embeddings": 512,
}
FLAGS: dict[str, list[dict[str, Any]]] = {
    "llama": [{}, {"attention_bias": True}, {"mlp_bias": True}, {"head_dim": 32}, {"tie_word_embeddings": True}],
    "mistral": [{}, {"head_dim": 24}],
    "qwen2": [{}, {"tie_word_embeddings": True}],
    "qwen3": [{}, {"head_dim": 16}, {"attention_bias": True}],
    "gemma": [{}, {"head_dim": 16}, {"attention_bias": True}, {"tie_word_embeddings": False}],
}


def make(**changes: Any) -> ModelSpec:
    config = {key: value for key, value in {**LLAMA, **changes}.items() if value != "absent"}
    return spec_from_config(config, "mine")


@pytest.mark.parametrize(("family", "flags"), [(family, flags) for family in FLAGS for flags in FLAGS[family]])
def test_linears_and_counts_are_those_of_transformers(family: str, flags: dict[str, Any]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {**LLAMA, "model_type": family, **flags}
    spec = spec_from_config(config, "mine")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    real = {
        name: (module.out_features, module.in_features, module.bias is not None)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    planned = {
        f"model.layers.{layer.index}.{linear.name}": (linear.out_features, linear.in_features, linear.bias)
        for layer in spec.layers
        for linear in layer.linears
    }
    head = {"lm_head": (spec.head.out_features, spec.head.in_features, spec.head.bias)}
    assert real == planned | head
    assert spec.params == sum(parameter.numel() for parameter in model.parameters())  # tied ones come once


def test_axes_name_what_rows_and_columns_run_over() -> None:
    axes = {linear.leaf: (linear.out_axis, linear.in_axis) for linear in make().layers[0].linears}
    assert axes == {
        "q_proj": (Axis.HEADS, Axis.MODEL),
        "k_proj": (Axis.KV_HEADS, Axis.MODEL),
        "v_proj": (Axis.KV_HEADS, Axis.MODEL),
        "o_proj": (Axis.MODEL, Axis.HEADS),
        "gate_proj": (Axis.FFN, Axis.MODEL),
        "up_proj": (Axis.FFN, Axis.MODEL),
        "down_proj": (Axis.MODEL, Axis.FFN),
    }
    assert (make().head.out_axis, make().head.in_axis) == (Axis.VOCAB, Axis.MODEL)
    assert [str(axis) for axis in Axis] == ["model", "heads", "kv_heads", "ffn", "vocab", "rank"]


def test_fields_and_counts() -> None:
    spec = make(attention_bias=True)
    assert (spec.name, spec.family, spec.hidden, spec.ffn, spec.vocab) == ("mine", "llama", 64, 112, 261)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.max_positions) == (4, 2, 16, 512)
    assert (spec.num_layers, [layer.index for layer in spec.layers], spec.tied) == (3, [0, 1, 2], False)
    matrices = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 112
    assert spec.linear_params == 3 * matrices
    biases, norms = 64 + 2 * 32 + 64, 2 * 64
    assert spec.params == 3 * (matrices + biases + norms) + 64 + 2 * 261 * 64


def test_a_tied_head_is_counted_once() -> None:
    assert make().params - make(tie_word_embeddings=True).params == 261 * 64


def test_what_a_config_may_leave_unsaid() -> None:
    assert make(num_key_value_heads="absent").num_kv_heads == 4  # Llama before grouped heads
    assert make(head_dim=None).head_dim == 16
    assert make(model_type="qwen3").head_dim == 128
    assert make(model_type="gemma").head_dim == 256
    assert make(model_type="gemma").tied and not make(tie_word_embeddings=None).tied


def test_layers_of_different_widths_are_counted_by_shape() -> None:
    narrow = LayerSpec(1, (LinearSpec("mlp.up_proj", Axis.FFN, Axis.MODEL, 8, 64, False),), 128)
    wide = make().layers[0]
    fields = {**vars(make()), "layers": (wide, narrow, LayerSpec(2, wide.linears, wide.other_params))}
    fields.pop("shapes", None)
    spec = ModelSpec(**fields)
    assert spec.shapes == ((wide, 2), (narrow, 1))
    assert spec.linear_params == 2 * wide.weights + 8 * 64


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"])
def test_a_mixture_of_experts_is_refused(key: str) -> None:
    with pytest.raises(InputError, match=f"mine is a mixture of experts \\({key} = 8\\)") as caught:
        make(model_type="mixtral", **{key: 8})
    assert "Llama, Mistral, Qwen2" in caught.value.next_step


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "phi3", "gpt2", "qwen3_moe"])
def test_other_families_are_refused_naming_those_handled(family: str) -> None:
    with pytest.raises(InputError, match=f"family '{family}'") as caught:
        make(model_type=family)
    assert "Qwen3 and Gemma" in str(caught.value)


@pytest.mark.parametrize("family", ["absent", None, 3, ["llama"]])
def test_a_config_without_family_is_refused(family: object) -> None:
    with pytest.raises(InputError, match="no model_type"):
        make(model_type=family)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "absent"}, "hidden_size is missing"),
        ({"vocab_size": "32000"}, "vocab_size must be a whole number above 0, not '32000'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a whole number above 0, not 0"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers must be .* not 2.0"),
        ({"intermediate_size": True}, "intermediate_size must be .* not True"),
        ({"intermediate_size": [112, 112]}, "intermediate_size must be"),
        ({"head_dim": -16}, "head_dim must be .* not -16"),
        ({"model_type": "mistral", "num_key_value_heads": None}, "num_key_value_heads is missing"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"hidden_size": 66}, "head_dim is missing and hidden_size 66 is not a multiple of num_attention_heads 4"),
    ],
)
def test_sizes_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(**changes)


def test_every_bad_size_is_named_at_once() -> None:
    with pytest.raises(InputError) as caught:
        make(hidden_size="absent", vocab_size=-1, num_attention_heads="four")
    assert all(key in caught.value.fact for key in ("hidden_size", "vocab_size", "num_attention_heads"))


def test_real_configs_of_the_data_folder(data_dir: Any) -> None:
    import json

    config = json.loads((data_dir / "models" / "stories3M" / "config.json").read_text())
    spec = spec_from_config(config, "stories3M")
    assert spec.params == 4096 * 192 + 6 * (2 * 192 * 192 + 2 * 64 * 192 + 3 * 512 * 192 + 2 * 192) + 192
