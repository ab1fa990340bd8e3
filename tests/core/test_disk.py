"""What a run will write, counted from integers: checked here by hand, and against a real run in ``end_to_end``."""

from typing import Any

import pytest

from effitrain.core.budget import MemoryBudget
from effitrain.core.disk import output_bytes, save_interval
from effitrain.core.plan import make_plan, resolve
from effitrain.core.presets import find_preset
from effitrain.core.recipe import make_recipe
from effitrain.core.spec import spec_from_config

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


def test_a_small_model_that_is_made_lies_there_too() -> None:
    pruned = {"fit": "prune", "prune_ratio": 0.5}
    made = forecast("llama-70b", pruned, 100) - forecast("llama-70b", {**pruned, "small_model": "small"}, 100)
    assert 18 * 10**9 < made < 26 * 10**9  # half of most layers in NF4, embedding and head in 16 bits


@pytest.mark.parametrize(("every", "steps", "interval"), [(None, 237, 23), (None, 3, 1), (7, 237, 7)])
def test_a_tenth_of_the_run_unless_told_otherwise(every: int | None, steps: int, interval: int) -> None:
    assert save_interval(make_recipe({"save_every": every}), steps) == interval


def forecast(model: str, fields: dict[str, Any], steps: int) -> int:
    preset, recipe = find_preset(model), make_recipe({"model": model, **fields})
    assert preset
    spec = spec_from_config(preset.config, model)
    plan = make_plan(spec, recipe, ROOMY)
    return output_bytes(spec, resolve(recipe, plan), plan, steps)
