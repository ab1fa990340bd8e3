"""Which ways a recipe allows, and which contradictions it is told of."""

from typing import Any

import pytest
from shapes import preset

from effitrain.core.budget import GIB, MemoryBudget
from effitrain.core.cut import small_spec
from effitrain.core.errors import InputError
from effitrain.core.recipe import make_recipe
from effitrain.core.ways import Way, ways

BUDGET = MemoryBudget(24 * GIB, 64 * GIB, GIB, "cuda")


def found(**fields: Any) -> list[Way]:
    return ways(preset("llama-3.1-8b"), make_recipe(fields), BUDGET)


def names(**fields: Any) -> list[tuple[str, str, float | None]]:
    return [(way.fit, way.weights, way.prune_ratio) for way in found(**fields)]


def test_exact_ways_come_first_unless_speed_is_preferred() -> None:
    exact, fast = names(), names(prefer="fast")
    assert exact[:2] == [("resident", "resident", None), ("stream", "streamed", None)] and len(exact) == 12
    assert fast[0] == exact[0] and fast[-1] == exact[1] and sorted(map(str, fast)) == sorted(map(str, exact))


def test_a_ratio_or_a_number_of_layers_says_what_is_meant() -> None:
    assert {way[0] for way in names(prune_ratio=0.5)} == {"prune"}
    assert {way[1] for way in names(resident_layers=3)} == {"streamed"}


@pytest.mark.parametrize("fit", ["auto", "prune"])
def test_loraprune_trains_the_whole_model(fit: str) -> None:
    (way,) = found(fit=fit, prune_method="loraprune", prune_ratio=0.5)
    assert (way.fit, way.weights) == ("prune", "resident") and way.spec.linear_params == found()[0].spec.linear_params


def test_what_is_no_training_takes_the_whole_model() -> None:
    spec = preset("llama-70b")
    for fields, expected in (({}, ["resident", "stream"]), ({"resident_layers": 3}, ["stream"])):
        found = ways(spec, make_recipe(fields), BUDGET, "score")
        assert [way.fit for way in found] == expected
        assert all(c.settings.work == "score" and not c.settings.offload for way in found for c in way.choices)
    with pytest.raises(InputError, match="answers differently"):
        ways(spec, make_recipe({"fit": "prune"}), BUDGET, "chat")


@pytest.mark.parametrize("order", ["layer", "micro-batch"])
def test_an_order_of_streaming_is_refused_where_nothing_streams(order: str) -> None:
    with pytest.raises(InputError, match=f"--stream-order {order} is for models that stream"):
        make_recipe({"fit": "resident", "stream_order": order})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"resident_layers": 32}, "has 32 layers, and some must be left to stream"),
        ({"resident_layers": 3, "recompute": "none"}, "--recompute none keeps all layers on the device"),
        ({"resident_layers": 3, "recompute": "mlp", "fit": "prune", "prune_ratio": 0.5}, "--recompute mlp"),
        ({"resident_layers": 3, "prune_method": "loraprune", "fit": "prune", "prune_ratio": 0.5}, "loraprune"),
    ],
)
def test_contradictions_are_told(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        found(**fields)


def test_a_pruned_model_is_not_pruned_again() -> None:
    spec = small_spec(preset("llama-3.1-8b"), make_recipe({"fit": "prune", "prune_ratio": 0.5}))
    assert {way.fit for way in ways(spec, make_recipe({}), BUDGET)} == {"resident", "stream"}
    with pytest.raises(InputError, match="pruned already"):
        ways(spec, make_recipe({"fit": "prune", "prune_ratio": 0.5}), BUDGET)
