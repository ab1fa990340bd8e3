"""What a run will write, counted from integers: checked here by hand, and against a real run in ``end_to_end``."""

from typing import Any

import pytest
from shapes import preset as spec_of

from effitrain.core.budget import MemoryBudget
from effitrain.core.cut import cut_spec
from effitrain.core.disk import bytes_to_come, save_interval
from effitrain.core.plan import make_plan, resolve
from effitrain.core.recipe import make_recipe

ROOMY = MemoryBudget(2**44, 2**44, 0, "cuda")
FACTORS_70B = 16 * 80 * (2 * (8192 + 8192) + 2 * (8192 + 1024) + 3 * (8192 + 28672))  # rank 16 on all seven linears
PARAMS_1B = 1_235_814_400


@pytest.mark.parametrize(
    ("model", "fields", "steps", "expected"),
    [
        ("llama-70b", {}, 100, 3 * 12 * FACTORS_70B),  # a new checkpoint beside two
        ("llama-70b", {"keep_checkpoints": 1}, 100, 2 * 12 * FACTORS_70B),
        ("llama-70b", {}, 1, (12 + 4) * FACTORS_70B),  # the only one, and the adapter
        ("llama-70b", {"save_every": 50}, 100, (2 * 12 + 4) * FACTORS_70B),
        ("llama-3.2-1b", {"method": "full", "save_every": 50}, 100, (2 * 12 + 2) * PARAMS_1B),
        ("llama-3.2-1b", {"method": "full"}, 100, 3 * 12 * PARAMS_1B),
    ],
)
def test_checkpoints_and_what_the_run_is_for(model: str, fields: dict[str, Any], steps: int, expected: int) -> None:
    assert forecast(model, fields, steps) == expected


@pytest.mark.parametrize(
    ("fields", "done", "held", "expected"),
    [
        ({}, 10, 1, 2 * 12),  # two more beside the one that is there
        ({}, 50, 2, 12),  # one of them goes when the next is written
        ({}, 90, 2, 12),
        ({}, 95, 2, 12),  # interrupted between two checkpoints
        ({}, 100, 2, 4),  # what it is for alone
        ({"keep_checkpoints": 1}, 50, 2, 12),  # two are there, and one of them goes only after the next is written
        ({"keep_checkpoints": 1}, 90, 2, 12),
        ({"keep_checkpoints": 3}, 50, 2, 2 * 12),
    ],
)
def test_what_is_left_of_a_run_that_goes_on(fields: dict[str, Any], done: int, held: int, expected: int) -> None:
    assert forecast("llama-70b", fields, 100, done, held) == expected * FACTORS_70B


def test_a_small_model_that_is_made_lies_there_too() -> None:
    pruned = {"fit": "prune", "prune_ratio": 0.5}
    missing, there = (forecast("llama-70b", pruned, 100, small_is_there=known) for known in (False, True))
    assert 18 * 10**9 < missing - there < 26 * 10**9  # half of most layers in NF4, embedding and head in 16 bits
    trained = forecast("llama-3.2-1b", {**pruned, "align": "train"}, 100)
    assert trained == pytest.approx(26 * cut_spec(spec_of("llama-3.2-1b"), 0.5).params, rel=0.01)


def test_of_pruning_while_training_both_forms_of_the_small_model_are_left() -> None:
    pruned = {"fit": "prune", "prune_ratio": 0.5, "prune_method": "loraprune"}
    small = cut_spec(spec_of("llama-3.1-8b"), 0.5)
    both, one = (forecast("llama-3.1-8b", {**pruned, **more}, 100, 100, 2) for more in ({}, {"quant": "none"}))
    assert one == 2 * small.params and both - one == pytest.approx(4.1e9, rel=0.05)


def test_what_is_trained_in_full_and_what_took_turns_is_saved_too() -> None:
    table = 4 * spec_of("llama-70b").embedding_params
    plain, trained = (forecast("llama-70b", {"train_embeddings": on}, 100, 100, 2) for on in (False, True))
    assert trained - plain == table
    reset, kept = (
        forecast("llama-3.1-8b", {"method": "lisa", "lisa_state": state}, 100) for state in ("reset", "keep-host")
    )
    layers = 32 * 218_112_000
    assert reset > 2 * layers and kept > reset + layers


@pytest.mark.parametrize(("every", "steps", "interval"), [(None, 237, 23), (None, 3, 1), (7, 237, 7)])
def test_a_tenth_of_the_run_unless_told_otherwise(every: int | None, steps: int, interval: int) -> None:
    assert save_interval(make_recipe({"save_every": every}), steps) == interval


def forecast(
    model: str, fields: dict[str, Any], steps: int, done: int = 0, held: int = 0, small_is_there: bool = False
) -> int:
    spec, recipe = spec_of(model), make_recipe({"model": model, **fields})
    plan = make_plan(spec, recipe, ROOMY)
    return bytes_to_come(spec, resolve(recipe, plan), plan, steps, done, held, small_is_there)
