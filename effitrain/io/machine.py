"""What this machine has: a CUDA card or none, free device memory, free host memory. Asked without importing torch."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Literal

from effitrain.core.budget import MemoryBudget, make_budget
from effitrain.core.recipe import Recipe
from effitrain.core.system import ONE_CARD
from effitrain.core.units import format_bytes


@dataclass(frozen=True)
class Card:
    """A CUDA card: its name, bytes in all and free, the half precision it computes in, bf16 since Ampere, and how many
    cards a program sees besides.
    """

    name: str
    total: int
    free: int
    half: Literal["bf16", "fp16"] = "bf16"
    idle: int = 0


def find_budget(recipe: Recipe, assume_card: bool = False) -> MemoryBudget:
    """The budget of ``recipe`` on this machine.

    Args:
        recipe: may name budgets, or a card that is not here.
        assume_card: where no card is found, plan for one with the named ``gpu_mem`` all the same.
    """
    found = card()
    free = found.free if found else recipe.gpu_mem or 0
    device: Literal["cpu", "cuda"] = "cuda" if found or assume_card else "cpu"
    budget = make_budget(recipe, device, free, free_host_bytes(), found.name if found else None, os.cpu_count() or 1)
    if found and not recipe.gpu:
        idle = (f"{found.idle + 1} cards are here. {ONE_CARD} This is {found.name}.",) if found.idle else ()
        return replace(budget, half=found.half, notices=(*budget.notices, *idle))
    return replace(budget, notices=(*budget.notices, *_assumed(recipe, budget)))


def _assumed(recipe: Recipe, budget: MemoryBudget) -> Iterator[str]:
    """What a plan for a card that is not here takes for granted."""
    if budget.device == "cpu":
        return
    if not recipe.gpu:
        yield "No card was found here: this plan is for a CUDA card with that memory."
    if recipe.host_mem is None:
        yield (
            f"Host memory is taken as this machine's: {format_bytes(budget.host_bytes)}, 80 % of what is free here."
            " Name another with --host-mem."
        )


@cache
def card() -> Card | None:
    """The CUDA card that a program gets, the first one or the first in CUDA_VISIBLE_DEVICES; None when there is none.

    Asked once a process, so ``free`` is from before this process put anything on the card.
    """
    try:
        name, total, free, *count = _ask_driver("--query-gpu=name,memory.total,memory.free,count")[0]
        return Card(name, int(total) * 2**20, int(free) * 2**20, _half(), _seen(*count) - 1)
    except (ValueError, IndexError):
        return None


def _seen(count: str = "") -> int:
    """Cards that a program sees, where the system has ``count``: all, or those that CUDA_VISIBLE_DEVICES names, up to
    the first that is no card.
    """
    here = int(count) if count.isdecimal() else None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return here or 1

    def is_one(name: str) -> bool:
        return name.startswith(("GPU-", "MIG-")) or (name.isdecimal() and (here is None or int(name) < here))

    return sum(1 for _ in takewhile(is_one, map(str.strip, visible.split(","))))


def _half() -> Literal["bf16", "fp16"]:
    """By compute capability, which drivers older than Ampere's successors do not tell: bf16 then."""
    answer = _ask_driver("--query-gpu=compute_cap")
    return "fp16" if answer and answer[0][0][:1] in ("5", "6", "7") else "bf16"


def process_device_bytes() -> int | None:
    """Device memory of this process as the driver counts it; None where it does not tell, as in containers and WSL2."""
    rows = _ask_driver("--query-compute-apps=pid,used_memory")
    found = [row[1] for row in rows if row[0] == str(os.getpid())]
    return int(found[0]) * 2**20 if found and found[0].isdecimal() else None


def _ask_driver(query: str) -> list[list[str]]:
    """The answer of nvidia-smi about the card in use, sizes in MiB, as rows of values; none when it has no answer."""
    tool = shutil.which("nvidia-smi")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if not tool or visible in ("", "-1"):
        return []
    command = [tool, query, "--format=csv,noheader,nounits", f"--id={visible}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [[value.strip() for value in line.split(",")] for line in answer.splitlines()]


def free_host_bytes() -> int:
    """Host memory that programs can still take, in bytes: the system's, or the container's limit when that is lower."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        stat = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        used -= int(stat.get("inactive_file", 0))  # page cache, given up when programs ask
    except (OSError, ValueError):  # no container, or "max"
        return free
    return max(0, min(free, limit - used))
