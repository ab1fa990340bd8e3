"""What nvidia-smi says, or does not say, about the card that this process would use."""

import os
import stat

import pytest

from effitrain.io import machine
from effitrain.io.machine import Card, card, find_budget, free_host_bytes, process_device_bytes
from effitrain.planning import recipe


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """``smi(script)``: an nvidia-smi that runs ``script`` is the only program on the path."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    card.cache_clear()

    def install(script):
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)

    yield install
    card.cache_clear()


ANSWER = 'echo "NVIDIA Card$3, 24564, 23000"'


def test_the_card_and_its_budget(smi):
    smi('echo "NVIDIA GeForce RTX 4090, 24564, 23000"')
    assert card() == Card("NVIDIA GeForce RTX 4090", 24564 * 2**20, 23000 * 2**20)
    budget = find_budget(recipe(gpu_mem="80G"))
    assert (budget.device, budget.gpu_bytes) == ("cuda", 23000 * 2**20) and "RTX 4090" in budget.notices[0]


def test_a_plan_for_a_card_that_is_not_here_says_whose_host_memory_it_takes(smi, monkeypatch):
    monkeypatch.setattr(machine, "free_host_bytes", lambda: 10 * 2**30)
    (named,) = find_budget(recipe(gpu="rtx4090"), assume_card=True).notices
    assert "this machine's: 8.0 GiB" in named and "--host-mem" in named
    absent, taken = find_budget(recipe(gpu_mem="20G"), assume_card=True).notices
    assert "No card was found" in absent and taken == named
    assert not find_budget(recipe(gpu="rtx4090", host_mem="64G"), assume_card=True).notices
    assert not find_budget(recipe()).notices


@pytest.mark.parametrize(
    ("visible", "asked"), [(None, "--id=0"), ("2", "--id=2"), ("3,1", "--id=3"), ("GPU-ab12", "--id=GPU-ab12")]
)
def test_the_card_that_cuda_would_use(smi, monkeypatch, visible, asked):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    smi(ANSWER)
    assert card() == Card(f"NVIDIA Card{asked}", 24564 * 2**20, 23000 * 2**20, idle=int(visible == "3,1"))


@pytest.mark.parametrize(
    ("visible", "count", "seen"),
    [
        *((None, "1", 1), (None, "4", 4), (None, "[N/A]", 1), ("1", "4", 1), ("0,1", "4", 2), ("0,GPU-ab12", "4", 2)),
        *(("0,-1,1", "4", 1), ("0, 1,9,2", "4", 2), ("0,,1", "4", 1), ("0,1", "[N/A]", 2)),
    ],
)
def test_cards_that_stay_idle_are_told(smi, monkeypatch, visible, count, seen):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    smi(f"echo 'NVIDIA A40, 24564, 23000, {count}'")
    told = [notice for notice in find_budget(recipe()).notices if "one card" in notice]
    assert len(told) == (seen > 1)
    assert not told or (told[0].startswith(f"{seen} cards are here. effitrain uses one card") and "A40" in told[0])


@pytest.mark.parametrize("visible", ["", "-1"])
def test_a_hidden_card_is_none(smi, monkeypatch, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    smi(ANSWER)
    assert card() is None and find_budget(recipe()).device == "cpu"


@pytest.mark.parametrize("script", ["exit 9", "echo", "echo No devices were found", "echo 'A, [N/A], 5'"])
def test_an_answer_without_a_card(smi, script):
    smi(script)
    assert card() is None


def test_no_driver(smi):
    assert card() is None and process_device_bytes() is None


def test_memory_of_this_process(smi):
    smi(f"echo '1, 300'; echo '{os.getpid()}, 512'")
    assert process_device_bytes() == 512 * 2**20
    smi("echo '1, 300'")
    assert process_device_bytes() is None
    smi(f"echo '{os.getpid()}, [N/A]'")
    assert process_device_bytes() is None


def test_host_memory_keeps_to_the_limit_of_a_container(monkeypatch):
    free = free_host_bytes()
    assert 2**20 < free < 2**50

    class Files:
        def __init__(self, path):
            self.path = path

        def read_text(self):
            return {
                "meminfo": "MemTotal: 9 kB\nMemAvailable: 4000 kB\n",
                "memory.max": "3000000\n",
                "memory.current": "1500000\n",
                "memory.stat": "active_file 300000\ninactive_file 500000\n",
            }[self.path.rpartition("/")[2]]

    monkeypatch.setattr(machine, "Path", Files)
    assert free_host_bytes() == 2_000_000
