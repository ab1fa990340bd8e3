"""Kernels timed against what they replace, each first compared with its reference.

A time is the median over calls, each measured by itself with events, while inputs rotate so that none is still in the
card's cache. The least time is that of the bytes that must move at the bandwidth of a copy, or of the products at the
rate of a large one in cuBLAS, whichever is longer, both measured on the same card; its share of the time is given.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from effitrain.core.units import format_bytes
from effitrain.evals import peers
from effitrain.evals.bench_cases import Shapes, cases
from effitrain.evals.kernels import error_of
from effitrain.evals.peers import UNSLOTH
from effitrain.quant.nf4 import warm_up

CACHE = 128 * 2**20  # bytes: more than twice the cache of any card yet but Hopper's and Blackwell's, which rotate less
WARM_UP, CALLS = 5, 30
PACKAGES = ("torch", "triton", "bitsandbytes", "peft", "liger-kernel", "unsloth")


@dataclass(frozen=True)
class Timing:
    """One contender of one case.

    Attributes:
        kernel: what is computed; ``shape`` of which size.
        contender: ``ours`` or what it is compared with.
        seconds: median of a call; None when it failed.
        of_roofline: share that the least time has in it.
        peak_bytes: allocated above what was there before.
        note: why it failed.
    """

    kernel: str
    shape: str
    contender: str
    seconds: float | None
    of_roofline: float | None = None
    peak_bytes: int = 0
    note: str = ""


def bench(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Iterator[Timing]:
    """Every contender of every case, Unsloth's at the end; a kernel that differs from its reference is not timed.

    A contender that fails is reported with its error.
    """
    warm_up(device)
    copy, product = copy_bandwidth(device), product_rate(device, dtype)
    for last in (False, True) if peers.installed("unsloth") else (False,):
        for case in cases(shapes, device, dtype):
            least = max(case.moved / copy, case.flops / product)
            error = 0.0 if last else error_of(case.kernel, device, dtype)
            for name in [name for name in case.contenders if (name == UNSLOTH) == last]:
                timing = partial(Timing, case.kernel, case.shape, name)
                if name == "ours" and not error < 0.1:
                    yield timing(None, note=f"differs from its reference by {error:.1e}: not timed")
                    continue
                try:
                    seconds, peak = measure(case.contenders[name], case.make, device)
                except Exception as problem:  # of another library, or out of memory: the others still count
                    yield timing(None, note=f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0]}")
                    continue
                yield timing(seconds, least / seconds, peak)


def measure(call: Callable[..., Any], make: Callable[[], Sequence[Any]], device: torch.device) -> tuple[float, int]:
    """Median seconds of a call, and the bytes it allocates at its peak."""
    first = make()
    size = sum(t.nbytes for t in first if isinstance(t, Tensor))
    inputs = [first, *(make() for _ in range(min(8, CACHE // max(size, CACHE // 8))))]
    for i in range(WARM_UP):
        call(*inputs[i % len(inputs)])
    if device.type != "cuda":
        return statistics.median(_wall(call, inputs[i % len(inputs)]) for i in range(3)), 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, pairs = torch.cuda.memory_allocated(), []
    for i in range(CALLS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call(*inputs[i % len(inputs)])
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3, peak


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy within the device reads and writes."""
    size = 256 * 2**20 if device.type == "cuda" else 2**20
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    seconds, _ = measure(target.copy_, lambda: [source], device)
    return 2 * size / seconds


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Multiplications and additions a second of a large product."""
    side = 8192 if device.type == "cuda" else 128
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds, _ = measure(torch.mm, lambda: [a, b], device)
    return 2 * side**3 / seconds


def versions() -> dict[str, str | None]:
    """Of the contenders' packages; None of one that is not installed."""
    found: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def as_json(timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """The timings as plain values."""
    return [asdict(timing) for timing in timings]


def _wall(call: Callable[..., Any], inputs: Sequence[Any]) -> float:
    started = time.perf_counter()
    call(*inputs)
    return time.perf_counter() - started


def line(timing: Timing) -> str:
    """One timing for the terminal."""
    if timing.seconds is None:
        return f"{timing.kernel:22}{timing.contender:24}{'--':>10}  {timing.shape}: {timing.note}"
    share = "" if not timing.of_roofline else f", {timing.of_roofline:.0%} of the roofline"
    peak = f", {format_bytes(timing.peak_bytes)}"
    return f"{timing.kernel:22}{timing.contender:24}{1e6 * timing.seconds:>10.0f} us  {timing.shape}{share}{peak}"
