"""Where the Triton kernels run: on CUDA cards from Ampere on, and on CPU tensors under Triton's interpreter.

Everywhere else, and for a kernel that is switched off, a public function computes its torch reference. A kernel is
switched off by EFFITRAIN_KERNELS_OFF (names with commas, or ``all``), or by ``effitrain doctor`` when its result on
this card is wrong.
"""

import json
import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class _Absent:
    """Stands for triton where it is not installed: kernels are defined and never launched."""

    constexpr = int

    @staticmethod
    def jit(function: Any) -> Any:
        """``function`` as it is."""
        return function


_installed = find_spec("triton") is not None
triton: Any = import_module("triton") if _installed else _Absent
tl: Any = import_module("triton.language") if _installed else _Absent

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MIN_CAPABILITY = (8, 0)  # Ampere: bfloat16 in arithmetic and in tensor cores
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def usable(kernel: str, *tensors: Tensor) -> bool:
    """Whether ``kernel`` may run on ``tensors``: all on one device that Triton serves, in dtypes the kernels have."""
    device = tensors[0].device
    if triton is _Absent or any(t.device != device or t.dtype not in DTYPES for t in tensors):
        return False
    if device.type == "cuda":
        return capability(device) >= MIN_CAPABILITY and not {kernel, "all"} & (by_user() | by_doctor())
    return device.type == "cpu" and INTERPRETED and not {kernel, "all"} & by_user()


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a card, such as (8, 9)."""
    return torch.cuda.get_device_capability(device)


def by_user() -> frozenset[str]:
    """Kernels that EFFITRAIN_KERNELS_OFF switches off."""
    return _names(os.environ.get("EFFITRAIN_KERNELS_OFF", ""))


@cache
def by_doctor() -> frozenset[str]:
    """Kernels whose results the doctor found wrong on this card with these versions."""
    return frozenset(_read(_file()).get(_here(), []))


def switch_off(kernels: list[str]) -> Path:
    """Let exactly ``kernels`` never run on this card with these versions of torch and triton; returns the file."""
    path = _file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**_read(path), _here(): sorted(kernels)}, indent=2) + "\n", encoding="utf-8")
    by_doctor.cache_clear()
    return path


def rows_of(x: Tensor) -> Tensor:
    """``x`` [..., n] as contiguous rows [m, n]."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def shaped(y: Tensor, *shape: int) -> Tensor:
    """Fresh ``y`` in another shape, as the output of an autograd function: one that may be changed in place, which
    torch forbids for a view made in there.
    """
    return torch.ops.aten._unsafe_view(y, shape)


@cache
def _names(text: str) -> frozenset[str]:
    return frozenset(name.strip() for name in text.split(",") if name.strip())


def _read(path: Path) -> dict[str, list[str]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet, or half a file: the doctor writes it anew
        return {}
    return found if isinstance(found, dict) else {}


def _file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "effitrain" / "kernels-off.json"


def _here() -> str:
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"
