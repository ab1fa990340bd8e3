"""The checks that the doctor and the benchmarks make: each passes in Triton's interpreter, and sees a wrong kernel."""

import math

import pytest
import torch

from effitrain.evals import doctor, kernels
from effitrain.evals.kernels import CHECKS, error_of, runs_on, wrong_kernels
from effitrain.kernels import backend, rope, swiglu

CPU = torch.device("cpu")
interpreter = pytest.mark.interpreter


@interpreter
@pytest.mark.parametrize("kernel", CHECKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_passes(kernel, dtype):
    assert runs_on(CPU) and error_of(kernel, CPU, dtype) <= kernels.TOLERANCES[dtype]


@interpreter
def test_wrong_ones_are_named(monkeypatch):
    turn = rope._turn
    monkeypatch.setattr(rope, "_turn", lambda *args: 1.001 * turn(*args))
    monkeypatch.setattr(swiglu, "_forward", None)  # one that cannot be launched
    monkeypatch.setattr(kernels, "CHECKS", {name: CHECKS[name] for name in ("rms_norm", "rope", "swiglu")})
    wrong = wrong_kernels(CPU, [torch.float32])
    assert list(wrong) == ["rope", "swiglu"] and wrong["rope"] == pytest.approx(1e-3, rel=0.1)
    assert math.isnan(wrong["swiglu"])


@pytest.fixture
def card(monkeypatch):
    """A card as far as the doctor can see, with kernels that are right."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(kernels, "runs_on", lambda device: True)
    monkeypatch.setattr(kernels, "wrong_kernels", lambda device, dtypes: {})
    backend.by_doctor.cache_clear()
    yield
    backend.by_doctor.cache_clear()


def test_the_doctor_switches_off_what_is_wrong_and_on_what_is_right_again(card, monkeypatch):
    assert doctor._kernels()[0] is True and backend.by_doctor() == frozenset()
    monkeypatch.setattr(kernels, "wrong_kernels", lambda device, dtypes: {"rope": 0.25})
    ok, detail = doctor._kernels()
    assert ok is False and "rope by 2.5e-01" in detail and "kernels-off.json" in detail
    assert backend.by_doctor() == {"rope"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "another card")
    backend.by_doctor.cache_clear()
    assert backend.by_doctor() == frozenset()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(kernels, "wrong_kernels", lambda device, dtypes: {})
    assert doctor._kernels()[0] is True and backend.by_doctor() == frozenset()


def test_the_doctor_without_a_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor._kernels() == (None, "no card")


def test_the_doctor_on_an_old_card(card, monkeypatch):
    monkeypatch.setattr(kernels, "runs_on", lambda device: False)
    assert doctor._kernels()[0] is None
