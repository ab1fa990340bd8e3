from typing import Any

import pytest

from effitrain.core.budget import GIB, MemoryBudget
from effitrain.core.choices import Choice, fastest, leanest, list_choices, sequence_length, time_per_token
from effitrain.core.presets import find_preset
from effitrain.core.recipe import make_recipe
from effitrain.core.spec import ModelSpec, spec_from_config

CPU = MemoryBudget(8 * GIB, 16 * GIB, 0, "cpu")


def preset(name: str) -> ModelSpec:
    found = find_preset(name)
    assert found is not None
    return spec_from_config(found.config, name)


def cuda(size: int) -> MemoryBudget:
    return MemoryBudget(size, 64 * GIB, GIB, "cuda")


def choices(budget: MemoryBudget = CPU, model: str = "qwen2.5-0.5b", **fields: Any) -> list[Choice]:
    return list_choices(preset(model), make_recipe(fields), budget)


def pick(budget: MemoryBudget, model: str = "llama-3.1-8b", **fields: Any) -> Choice:
    return fastest(choices(budget, model, **fields), make_recipe(fields), budget)


def test_what_is_open_is_combined() -> None:
    found = {(choice.settings.recompute, choice.settings.batch_size) for choice in choices(cuda(GIB))}
    assert found == {(recompute, batch) for recompute in ("none", "layer") for batch in (1, 2, 4, 8, 16)}
    assert len(choices(batch_size=3)) == 2
    assert len(choices(batch_size=3, recompute="none")) == 1


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [(1, 16), (2, 8), (4, 4), (8, 2), (16, 1)]),
        ({"batch_size": 3}, [(3, 5)]),
        ({"batch_size": 64}, [(64, 1)]),
        ({"batch_size": 4, "grad_accum": 1}, [(4, 1)]),
        ({"grad_accum": 4}, [(1, 4), (2, 4), (4, 4)]),
        ({"grad_accum": 100}, [(1, 100)]),
    ],
)
def test_a_step_has_sixteen_samples(fields: dict[str, Any], expected: list[tuple[int, int]]) -> None:
    found = choices(cuda(GIB), recompute="none", **fields)
    assert [(choice.settings.batch_size, choice.settings.grad_accum) for choice in found] == expected


@pytest.mark.parametrize(("length", "largest"), [(64, 16), (512, 8), (2048, 2), (3000, 1), (8192, 1)])
def test_a_cpu_takes_no_more_tokens_at_once_than_make_it_faster(length: int, largest: int) -> None:
    assert max(choice.settings.batch_size for choice in choices(CPU, max_seq_len=length)) == largest


def test_defaults_by_device() -> None:
    assert {choice.settings.dtype for choice in choices(CPU)} == {"fp32"}
    assert {choice.settings.dtype for choice in choices(cuda(GIB))} == {"bf16"}
    assert {choice.settings.dtype for choice in choices(CPU, dtype="bf16")} == {"bf16"}
    assert {choice.settings.lr for choice in choices()} == {2e-4}
    assert {choice.settings.lr for choice in choices(lr=1e-3)} == {1e-3}


def test_length_is_the_models_at_most_2048() -> None:
    short = spec_from_config(
        {
            "model_type": "llama",
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "vocab_size": 8,
            "max_position_embeddings": 256,
        },
        "short",
    )
    assert sequence_length(short, make_recipe({})) == 256
    assert sequence_length(preset("llama-3.1-8b"), make_recipe({})) == 2048
    assert sequence_length(short, make_recipe({"max_seq_len": 1024})) == 1024


def test_plenty_of_memory_means_no_recomputation_and_the_largest_micro_batch() -> None:
    best = pick(cuda(1000 * GIB)).settings
    assert (best.recompute, best.batch_size, best.grad_accum) == ("none", 16, 1)


def test_smaller_micro_batches_come_before_recomputation() -> None:
    best = pick(cuda(24 * GIB)).settings
    assert (best.recompute, best.batch_size, best.grad_accum) == ("none", 1, 16)
    best = pick(cuda(12 * GIB)).settings
    assert best.recompute == "layer" and best.batch_size > 1


def test_with_few_tokens_dequantising_is_dearer_than_recomputing() -> None:
    one = pick(cuda(8 * GIB), max_seq_len=32, batch_size=1)
    many = choices(cuda(8 * GIB), "llama-3.1-8b", max_seq_len=32, batch_size=16, recompute="layer")[0]
    recipe = make_recipe({})
    assert one.settings.recompute == "none"
    assert time_per_token(many.settings, recipe) < time_per_token(one.settings, recipe)
    plain = make_recipe({"quant": "none"})
    assert time_per_token(many.settings, plain) == 6 and time_per_token(one.settings, plain) == 4


def test_where_nothing_fits_the_leanest_is_shown() -> None:
    found = choices(cuda(GIB), "llama-70b")
    best = fastest(found, make_recipe({}), cuda(GIB))
    assert best == leanest(found) and best.peak == min(choice.peak for choice in found)
    assert (best.settings.batch_size, best.settings.recompute) == (1, "layer")


def test_both_sides_must_fit() -> None:
    choice = choices(batch_size=1, recompute="layer")[0]
    exact = MemoryBudget(choice.peak, choice.host_peak, 0, "cpu")
    assert choice.fits(exact)
    assert not choice.fits(MemoryBudget(choice.peak - 1, choice.host_peak, 0, "cpu"))
    assert not choice.fits(MemoryBudget(choice.peak, choice.host_peak - 1, 0, "cpu"))
