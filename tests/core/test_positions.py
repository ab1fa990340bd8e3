"""Scaled positions: what is chosen, what is refused, and that transformers computes them from the config we write."""

from typing import Any

import pytest

from effitrain.core.errors import InputError
from effitrain.core.positions import own_scaling, same_positions, scaled_config, settled, with_positions_of
from effitrain.core.recipe import make_recipe

PLAIN = {
    "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 512,
    "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 64, "rope_theta": 10000.0, "rope_scaling": None,
}  # fmt: skip
NEW = {**{k: v for k, v in PLAIN.items() if not k.startswith("rope")},
       "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}  # fmt: skip
LLAMA3 = {**PLAIN, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}  # fmt: skip
LINEAR = {**PLAIN, "max_position_embeddings": 2048, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}


def chosen(config: dict[str, Any], **fields: Any) -> tuple[str, float | None]:
    recipe = settled(make_recipe(fields), config, "m")
    assert settled(recipe, config, "m") == recipe  # as when a run is repeated from its recipe
    return recipe.rope_scaling, recipe.rope_factor


def scaled(config: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return scaled_config(config, settled(make_recipe(fields), config, "m"))


@pytest.mark.parametrize("config", [PLAIN, NEW, LLAMA3, LINEAR])
def test_a_model_within_its_length_is_left_as_it_is(config: dict[str, Any]) -> None:
    for fields in ({}, {"max_seq_len": 512}, {"rope_scaling": "none", "max_seq_len": 4096}):
        assert chosen(config, **fields) == ("none", None) and scaled(config, **fields) == config


@pytest.mark.parametrize("config", [PLAIN, NEW])
def test_beyond_it_positions_are_divided_by_the_smallest_whole_factor(config: dict[str, Any]) -> None:
    assert chosen(config, max_seq_len=513) == ("linear", 2.0)
    assert chosen(config, max_seq_len=2048) == ("linear", 4.0)
    assert chosen(config, rope_factor=2.5) == ("linear", 2.5)
    assert chosen(config, rope_scaling="yarn", max_seq_len=1024) == ("yarn", 2.0)
    assert chosen(config, rope_scaling="ntk", rope_factor=8) == ("ntk", 8.0)
    assert scaled(config, max_seq_len=2048)["max_position_embeddings"] == 2048
    assert scaled(config, rope_factor=2.5)["max_position_embeddings"] == 1280


def test_a_linear_scaling_is_multiplied() -> None:
    found = scaled(LINEAR, max_seq_len=4096)
    assert found["rope_scaling"] == {"rope_type": "linear", "factor": 8.0} and found["max_position_embeddings"] == 4096


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (LLAMA3, {"max_seq_len": 513}),
        (LLAMA3, {"rope_scaling": "linear", "max_seq_len": 1024}),
        (LLAMA3, {"rope_scaling": "yarn"}),
        (LINEAR, {"rope_scaling": "yarn", "max_seq_len": 4096}),
        (LINEAR, {"rope_scaling": "ntk"}),
    ],
)
def test_a_scaling_of_the_models_own_is_never_replaced(config: dict[str, Any], fields: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="positions of its own") as caught:
        settled(make_recipe(fields), config, "m")
    assert "--rope-scaling none" in caught.value.next_step


@pytest.mark.parametrize("kind", ["linear", "ntk", "yarn"])
def test_a_scaling_that_would_change_nothing_is_refused(kind: str) -> None:
    for fields in ({}, {"max_seq_len": 512}):
        with pytest.raises(InputError, match=f"--rope-scaling {kind} would change nothing: m has 512 positions"):
            chosen(PLAIN, rope_scaling=kind, **fields)
    with pytest.raises(InputError, match=r"--rope-factor 1.*greater than 1"):
        chosen(PLAIN, rope_scaling=kind, rope_factor=1)


def test_a_factor_that_does_not_reach_is_refused() -> None:
    with pytest.raises(InputError, match="--rope-factor 2 reaches 1,024 positions") as caught:
        settled(make_recipe({"rope_factor": 2, "max_seq_len": 1500}), PLAIN, "m")
    assert "--rope-factor 3" in caught.value.next_step


def test_positions_travel_from_config_to_config() -> None:
    small = {**NEW, "intermediate_size": 32}
    moved = with_positions_of(scaled(NEW, max_seq_len=1024), small)
    assert moved["intermediate_size"] == 32 and same_positions(moved, scaled(PLAIN, max_seq_len=1024))
    assert own_scaling(moved) == "linear" and not same_positions(moved, PLAIN) and same_positions(PLAIN, NEW)


@pytest.mark.parametrize("config", [PLAIN, NEW])
@pytest.mark.parametrize("kind", ["linear", "ntk", "yarn"])
def test_transformers_computes_what_the_papers_say(config: dict[str, Any], kind: str) -> None:
    """The inverse frequencies d/2 of a head of 16: against the formulas, in float64."""
    import torch
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    d, factor, known = 16, 4.0, 512
    made = scaled(config, rope_scaling=kind, rope_factor=factor)
    rotary = LlamaRotaryEmbedding(config=AutoConfig.for_model(**made))
    exponents = torch.arange(0, d, 2, dtype=torch.float64) / d
    plain = 10_000.0**-exponents
    if kind == "linear":
        wanted, sharper = plain / factor, 1.0
    elif kind == "ntk":
        wanted, sharper = (10_000.0 * factor ** (d / (d - 2))) ** -exponents, 1.0
        assert torch.allclose(wanted[-1], plain[-1] / factor) and wanted[0] == 1
    else:  # Peng et al. 2023: wavelengths that turn 32 times within the known length stay, below once are divided
        turns = known * plain / (2 * torch.pi)
        assert torch.allclose(rotary.inv_freq[turns > 32].double(), plain[turns > 32])
        assert torch.allclose(rotary.inv_freq[turns < 1].double(), plain[turns < 1] / factor)
        wanted, sharper = rotary.inv_freq.double(), 0.1 * torch.tensor(factor).log().item() + 1
    torch.testing.assert_close(rotary.inv_freq.double(), wanted, rtol=1e-6, atol=0)
    assert rotary.attention_scaling == pytest.approx(sharper)
