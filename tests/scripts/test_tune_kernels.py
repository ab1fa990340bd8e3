"""The tuner's choices, from times that are given: the fastest tile for each range, and none that loses to cuBLAS."""

import importlib.util
from pathlib import Path

import pytest
import torch

from effitrain.evals.bench_cases import Shapes
from effitrain.evals.kernels import Maker
from effitrain.kernels import nf4_linear, tiles
from effitrain.kernels.tiles import Tile, all_tiles

SCRIPT = Path(__file__).parents[2] / "scripts" / "tune_kernels.py"
SMALL = Shapes("small", 64, 128, 2, 1, 32, 300, 24, 4)
START = all_tiles()["default"]
MANY = Tile(64, 128, 64, 4, 2)


@pytest.fixture
def tuner():
    spec = importlib.util.spec_from_file_location("tune_kernels", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _tuned(tuner):
    make = Maker(torch.device("cpu"), torch.float32, torch.Generator().manual_seed(0))
    return tuner.tune(make, [SMALL], START)


def test_the_fastest_are_chosen(tuner, monkeypatch):
    def timed(chosen, call, inputs):
        if call is tuner.both_ways:
            tile = chosen.nf4_tile(len(inputs[0]))
            return 500.0 if tile is None else len(inputs[0]) * (1 + (tile != MANY))
        if call is tuner.lora_linear.project:
            return 2.0 - chosen.lora_fused - (chosen.lora.n == 256)
        return abs(chosen.dequantize_blocks - 64)

    monkeypatch.setattr(tuner, "timed", timed)
    found = _tuned(tuner)
    assert found.dequantize_blocks == 64 and found.lora_fused and found.lora.n == 256
    assert [most for most, _ in found.nf4] == [16, 64, 256]  # 1,024 tokens take twice as long as dequantising first
    assert [tile == MANY for _, tile in found.nf4] == [False, True, True] and found.nf4[0][1].m == 16


def test_nothing_is_chosen_that_loses(tuner, monkeypatch):
    monkeypatch.setattr(tuner, "timed", lambda chosen, call, inputs: 1.0 + chosen.lora_fused + bool(chosen.nf4))
    found = _tuned(tuner)
    assert found.nf4 == () and not found.lora_fused


def test_times_are_those_of_the_tiles_at_hand(tuner, monkeypatch):
    """While a candidate is timed every room has its tiles, and afterwards the card's again; one that fails is last."""
    chosen = tuner.replace(START, nf4=((7, MANY),))
    seen = []
    assert tuner.timed(chosen, lambda: seen.append(nf4_linear.tiles_for(tuner.DEVICE)), []) > 0
    assert set(seen) == {chosen} and nf4_linear.tiles_for is tiles.tiles_for

    def fails():
        raise RuntimeError("out of resources")

    assert tuner.timed(chosen, fails, []) == float("inf") and nf4_linear.tiles_for is tiles.tiles_for


def test_what_is_written_is_what_is_read(tuner):
    found = tuner.replace(START, nf4=((16, START.lora), (64, MANY)), lora_fused=True)
    assert tiles._tiles(tuner.as_json(found)) == found
