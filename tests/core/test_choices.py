from dataclasses import replace
from typing import Any

import pytest
from shapes import preset

from effitrain.core.budget import GIB, MemoryBudget
from effitrain.core.cards import Rates
from effitrain.core.choices import Choice, best, compute_dtype, leanest, list_choices, sequence_length
from effitrain.core.presets import find_preset
from effitrain.core.recipe import make_recipe
from effitrain.core.spec import spec_from_config

CPU = MemoryBudget(8 * GIB, 16 * GIB, 0, "cpu")


def cuda(size: int) -> MemoryBudget:
    return MemoryBudget(size, 64 * GIB, GIB, "cuda")


def choices(budget: MemoryBudget = CPU, model: str = "qwen2.5-0.5b", **fields: Any) -> list[Choice]:
    return list_choices(preset(model), make_recipe(fields), budget)


def pick(budget: MemoryBudget, model: str = "llama-3.1-8b", **fields: Any) -> Choice:
    return best(choices(budget, model, **fields), budget)


def test_what_is_open_is_combined() -> None:
    found = [choice.settings for choice in choices(cuda(GIB), optimizer="adamw")]
    kept = [("none", False), ("mlp", False), ("layer", False), ("layer", True)]
    assert {(s.recompute, s.offload, s.batch_size) for s in found} == {(*k, b) for k in kept for b in (1, 2, 4, 8, 16)}
    assert len(choices(batch_size=3, optimizer="adamw")) == 4
    assert len(choices(batch_size=3, recompute="none", optimizer="adamw8bit")) == 1


def test_eight_bit_states_come_only_on_top_of_the_leanest() -> None:
    *exact, rounded = choices(cuda(GIB))
    assert {choice.settings.optimizer for choice in exact} == {"adamw"}
    assert rounded.settings == replace(leanest(exact, cuda(GIB)).settings, optimizer="adamw8bit")
    need = min(choice.peak for choice in exact)
    assert best([*exact, rounded], cuda(need)).settings.optimizer == "adamw"
    assert best([*exact, rounded], cuda(need - 1)) == rounded


def test_tiles_come_only_where_nothing_else_fits() -> None:
    fields = {"max_seq_len": 32768, "batch_size": 1, "recompute": "layer", "offload_activations": "on"}
    whole = pick(cuda(24 * GIB), **fields, optimizer="adamw")
    assert whole.settings.mlp_tiles == 1
    tiled = pick(cuda(whole.peak - 1), **fields)
    assert (tiled.settings.mlp_tiles, tiled.settings.tile, tiled.settings.optimizer) == (8, 4096, "adamw")
    assert tiled.peak < 0.7 * whole.peak
    assert pick(cuda(whole.peak - 1), **fields, lora_dropout=0.1).settings.mlp_tiles == 1
    assert pick(cuda(tiled.peak - 1), **fields).settings.optimizer == "adamw8bit"
    assert pick(cuda(4 * GIB), **{**fields, "max_seq_len": 4096}).settings.mlp_tiles == 1
    asked = pick(cuda(24 * GIB), **fields, mlp_tiles=3)
    assert (asked.settings.mlp_tiles, asked.settings.tile) == (3, 10923)
    assert 0.9 * whole.tokens_per_second < asked.tokens_per_second < whole.tokens_per_second


def test_streamed_layers_stay_where_there_is_room() -> None:
    spec, recipe = (
        preset("llama-70b"),
        make_recipe({"batch_size": 1, "max_seq_len": 4096, "optimizer": "adamw", "grad_accum": 1}),
    )

    def streamed(gpu: int, host: int) -> Choice:
        (choice,) = list_choices(spec, recipe, MemoryBudget(gpu, host, GIB, "cuda"), "streamed")
        return choice

    roomy = streamed(20 * GIB, 64 * GIB)
    assert roomy.fits(MemoryBudget(20 * GIB, 64 * GIB, GIB, "cuda")) and roomy.settings.on_disk == 0
    assert 80 - roomy.settings.streamed >= 20
    exact = roomy.peak
    assert streamed(exact, 64 * GIB) == roomy
    assert streamed(exact - 1, 64 * GIB).settings.streamed == roomy.settings.streamed + 1
    short = streamed(20 * GIB, 16 * GIB)
    assert 0 < short.settings.on_disk < short.settings.streamed and short.host_peak <= 16 * GIB
    assert streamed(20 * GIB, short.host_peak).settings == short.settings
    assert streamed(20 * GIB, short.host_peak - 1).settings.on_disk == short.settings.on_disk + 1
    made_up = list_choices(
        spec, recipe.changed(weights="synthetic"), MemoryBudget(20 * GIB, 16 * GIB, GIB, "cuda"), "streamed"
    )
    assert not made_up[0].settings.on_disk and made_up[0].host_peak > 16 * GIB


def test_by_layer_is_chosen_where_copies_would_show() -> None:
    spec, slow = preset("llama-70b"), Rates(165e12, 1e12, 3e9)
    recipe = make_recipe({"batch_size": 1, "grad_accum": 8, "max_seq_len": 1024, "optimizer": "adamw"})
    for rates, expected in ((slow, True), (Rates(165e12, 1e12, 1e12), False)):
        budget = MemoryBudget(20 * GIB, 64 * GIB, GIB, "cuda", rates=rates)
        chosen = best(list_choices(spec, recipe, budget, "streamed"), budget)
        assert (chosen.settings.at_once > 1) == expected and chosen.fits(budget)
    together, one = (
        list_choices(spec, recipe.changed(stream_order=o), budget, "streamed")[0] for o in ("layer", "micro-batch")
    )
    assert together.host_peak - one.host_peak > 7 * 80 * 1024 * 8192 * 2 - 10 * GIB


def test_the_peak_of_streaming_does_not_grow_with_the_layers() -> None:
    recipe = make_recipe({"resident_layers": 0, "lora_targets": "lm_head", "batch_size": 1})
    config = dict(find_preset("llama-70b").config)  # type: ignore[union-attr]
    peaks = [
        list_choices(spec_from_config({**config, "num_hidden_layers": n}, "x"), recipe, cuda(GIB), "streamed")[0].peak
        for n in (20, 80, 160)
    ]
    small = 2 * 2 * 8192 * 2  # the norms, which stay
    assert peaks[1] - peaks[0] <= 60 * small and peaks[2] - peaks[1] <= 80 * small


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
    found = choices(cuda(GIB), recompute="none", optimizer="adamw", **fields)
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


@pytest.mark.parametrize(
    ("device", "half", "asked", "expected"),
    [
        ("cpu", "bf16", "auto", "fp32"), ("cuda", "bf16", "auto", "bf16"), ("cuda", "fp16", "auto", "fp16"),
        ("cpu", "bf16", "bf16", "bf16"), ("cuda", "fp16", "fp32", "fp32"),
    ],
)  # fmt: skip
def test_the_dtype_is_the_recipes_or_the_devices(device: Any, half: Any, asked: str, expected: str) -> None:
    budget = MemoryBudget(GIB, GIB, 0, device, half=half)
    assert compute_dtype(make_recipe({"dtype": asked}), budget) == expected


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
    chosen = pick(cuda(1000 * GIB)).settings
    assert (chosen.recompute, chosen.batch_size, chosen.grad_accum) == ("none", 16, 1)


def test_less_memory_means_smaller_micro_batches_then_more_recomputation() -> None:
    levels = [pick(cuda(size * GIB)).settings for size in (24, 12, 7)]
    assert [(s.recompute, s.batch_size) for s in levels] == [("none", 1), ("mlp", 1), ("layer", 2)]


def test_where_nothing_fits_the_leanest_is_shown() -> None:
    found = choices(cuda(GIB), "llama-70b")
    chosen = best(found, cuda(GIB))
    assert chosen == leanest(found, cuda(GIB)) and chosen.peak == min(choice.peak for choice in found)
    assert (chosen.settings.batch_size, chosen.settings.recompute, chosen.settings.offload) == (1, "layer", True)


def test_both_sides_must_fit() -> None:
    choice = choices(batch_size=1, recompute="layer")[0]
    exact = MemoryBudget(choice.peak, choice.host_peak, 0, "cpu")
    assert choice.fits(exact)
    assert not choice.fits(MemoryBudget(choice.peak - 1, choice.host_peak, 0, "cpu"))
    assert not choice.fits(MemoryBudget(choice.peak, choice.host_peak - 1, 0, "cpu"))
