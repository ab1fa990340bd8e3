"""The kernel benchmark runs every contender and times no kernel that is wrong; its numbers need a card."""

import json

import pytest
import torch
from click.testing import CliRunner

from effitrain.cli.bench import command
from effitrain.core.errors import InputError
from effitrain.evals import bench_kernels as room
from effitrain.evals.bench_cases import Case, Shapes

SMALL = Shapes("small", 64, 128, 2, 1, 32, 300, 24, 4)
KERNELS = [
    "nf4_dequantize",
    "nf4_linear",
    "lora_linear",
    "lora_qkv",
    "lora_mlp",
    "rms_norm",
    "rope",
    "swiglu",
    "linear_cross_entropy",
]


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch):
    """torch.compile would take a minute of C++ here."""
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(room, "error_of", lambda kernel, device, dtype: 0.3 if kernel == "rope" else 0.0)


def test_every_contender_is_timed_and_a_wrong_kernel_is_not():
    timings = list(room.bench(SMALL, torch.device("cpu"), torch.float32))
    assert list(dict.fromkeys(t.kernel for t in timings)) == KERNELS
    for timing in timings:
        wrong = timing.kernel == "rope" and timing.contender == "ours"
        assert (timing.seconds is None) == wrong, timing
        assert timing.contender in room.line(timing)
    ours = {(t.kernel, t.shape) for t in timings if t.contender == "ours"}
    assert {(t.kernel, t.shape) for t in timings if t.contender != "ours"} == ours
    assert all(t.of_roofline for t in timings if t.seconds is not None)
    assert "not timed" in next(t.note for t in timings if t.kernel == "rope")
    json.dumps(room.as_json(timings))


def test_a_contender_that_fails_is_a_line(monkeypatch):
    def broken(*_):
        raise ValueError("not on this card\nmore")

    case = Case("swiglu", "3", lambda: [torch.ones(3)], {"ours": broken, "eager": torch.sin})
    monkeypatch.setattr(room, "cases", lambda *_: iter([case]))
    ours, eager = room.bench(SMALL, torch.device("cpu"), torch.float32)
    assert ours.note == "ValueError: not on this card" and eager.seconds is not None


def test_without_a_card_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(command, ["kernels"])
    assert isinstance(result.exception, InputError) and "no CUDA card" in str(result.exception)
