"""Fields that contradict each other, or that nothing would read, are refused with what is said of them."""

import pytest

from effitrain.core.errors import InputError
from effitrain.core.recipe import make_recipe


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"quant": "nf4"}, "--quant nf4 freezes"),
        ({"fit": "stream"}, "never copied back"),
        ({"resident_layers": 1}, "never copied back"),
        ({"fit": "prune", "prune_ratio": 0.5}, "nothing can be recovered"),
        ({"prune_ratio": 0.5}, "nothing can be recovered"),
        ({"lora_r": 8}, "--lora-r is for adapters"),
        ({"init_adapter": "x"}, "--init-adapter is for adapters"),
        ({"mlp_tiles": 2}, "--mlp-tiles is for adapters"),
    ],
)
def test_what_full_tuning_cannot_use_is_refused(fields, reason) -> None:
    with pytest.raises(InputError, match=reason):
        make_recipe({"method": "full", **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mlp_tiles": 2, "recompute": "none"}, "--mlp-tiles computes layers again, and --recompute none"),
        ({"mlp_tiles": 2, "lora_dropout": 0.1}, "leave out --lora-dropout"),
        ({"join_documents": True, "packing": True}, "--packing keeps samples apart"),
        (
            {"small_model": "small", "prune_score": "flap"},
            "--prune-score is for pruning, and --small-model small is pruned already",
        ),
        ({"join_documents": True, "format": "alpaca"}, "--join-documents is for running text, and --format is alpaca"),
    ],
)
def test_what_cannot_both_be_had_for_long_context(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_recipe(fields)


def test_one_tile_is_none() -> None:
    assert make_recipe({"mlp_tiles": 1, "recompute": "none", "lora_dropout": 0.1}).mlp_tiles == 1
    assert make_recipe({"mlp_tiles": "auto"}).mlp_tiles is None


def test_all_contradictions_come_in_one_message() -> None:
    with pytest.raises(InputError) as caught:
        make_recipe({"join_documents": True, "packing": True, "fit": "stream", "align": "none", "lisa_layers": 4})
    message = str(caught.value)
    for part in ("--packing keeps", "--align none is for --fit prune", "--lisa-layers is for --method lisa,"):
        assert part in message
