"""Where kernels run: not without triton, nor on old cards, nor where they are switched off; then references compute."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from effitrain.kernels import backend
from effitrain.kernels.backend import switch_off, usable
from effitrain.kernels.tiles import Tiles, all_tiles, tiles_for

FILES = sorted(p.stem for p in Path(backend.__file__).parent.glob("*.py") if p.stem != "__init__")


class OnCard:
    """As much of a tensor on a card as is asked for."""

    dtype, device = torch.bfloat16, torch.device("cuda")


@pytest.fixture
def card(monkeypatch):
    """A card of a capability that may be set, on which nothing is switched off."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    backend.by_doctor.cache_clear()
    yield lambda *version: monkeypatch.setattr(backend, "capability", lambda device: version)
    backend.by_doctor.cache_clear()


@pytest.mark.parametrize(("version", "runs"), [((7, 5), False), ((8, 0), True), ((8, 9), True), ((12, 0), True)])
def test_cards(card, version, runs):
    card(*version)
    assert usable("rope", OnCard()) is runs


def test_the_user_and_the_doctor_switch_off(card, monkeypatch):
    card(9, 0)
    monkeypatch.setenv("EFFITRAIN_KERNELS_OFF", "rope, swiglu")
    assert [usable(name, OnCard()) for name in ("rope", "swiglu", "rms_norm")] == [False, False, True]
    switch_off(["rms_norm"])
    assert not usable("rms_norm", OnCard()) and usable("lora_mlp", OnCard())
    monkeypatch.setenv("EFFITRAIN_KERNELS_OFF", "all")
    assert not usable("lora_mlp", OnCard())


def test_half_a_file_of_the_doctor_is_no_file(card):
    card(9, 0)
    switch_off(["rope"]).write_text('{"a card')
    backend.by_doctor.cache_clear()
    assert usable("rope", OnCard())


def test_dtypes_and_devices(card):
    card(9, 0)
    double, other = OnCard(), OnCard()
    double.dtype, other.device = torch.float64, torch.device("cpu")
    assert not usable("rope", double) and not usable("rope", OnCard(), other)


def test_plain_tensors_take_the_reference(plain):
    assert not usable("rope", torch.zeros(2))


def test_every_file_imports_and_computes_without_triton():
    code = f"""
import sys
sys.modules["triton"] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else find(name, *a)
import importlib, torch
for name in {FILES}:
    importlib.import_module("effitrain.kernels." + name)
from effitrain.kernels.rms_norm import reference, rms_norm
x = torch.randn(3, 8)
assert torch.equal(rms_norm(x, torch.ones(8), 1e-5), reference(x, torch.ones(8), 1e-5))
"""
    environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_the_default_tiles_serve_an_unknown_card():
    tables = all_tiles()
    assert all(isinstance(t, Tiles) for t in tables.values())
    assert tiles_for(torch.device("cpu")) == tables["default"]
    for tiles in tables.values():
        assert all(tile.k % 64 == 0 for _, tile in tiles.nf4) and [n for n, _ in tiles.nf4] == sorted(
            {n for n, _ in tiles.nf4}
        )
        assert min(tile.m for tile in (tiles.lora, *(tile for _, tile in tiles.nf4))) >= 16
