"""Kernels timed against what they replace, each first compared with its reference.

A time is the median over calls, each measured by itself with events, while inputs rotate so that none is still in the
card's cache. Where memory is the bound, the bytes that must move over the time are given as a share of what a copy
reaches on the same card.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from effitrain.core.units import format_bytes
from effitrain.evals.kernels import Maker, error_of
from effitrain.kernels import (
    linear_cross_entropy,
    lora_linear,
    lora_mlp,
    nf4_dequantize,
    nf4_linear,
    rms_norm,
    rope,
    swiglu,
)
from effitrain.kernels.lora_linear import Linear
from effitrain.quant.nf4 import warm_up

CACHE = 128 * 2**20  # bytes: more than twice the cache of any card yet but Hopper's and Blackwell's, which rotate less
WARM_UP, CALLS = 5, 30


@dataclass(frozen=True)
class Shapes:
    """Sizes of a model's layer, and what passes through it."""

    name: str
    hidden: int
    ffn: int
    heads: int
    head_dim: int
    vocab: int
    tokens: int
    rank: int


LLAMA_8B = Shapes("8B", 4096, 14336, 32, 128, 128256, 4096, 16)
LLAMA_70B = Shapes("70B", 8192, 28672, 64, 128, 128256, 4096, 16)


@dataclass(frozen=True)
class Timing:
    """One contender of one case.

    Attributes:
        kernel: what is computed; ``shape`` of which size.
        contender: ``ours`` or what it is compared with.
        seconds: median of a call; None when it failed.
        of_copy: share of the bandwidth of a plain copy, where memory is the bound.
        peak_bytes: allocated above what was there before.
        note: why it failed.
    """

    kernel: str
    shape: str
    contender: str
    seconds: float | None
    of_copy: float | None = None
    peak_bytes: int = 0
    note: str = ""


@dataclass(frozen=True)
class Case:
    """One thing to compute, by several ways: ``make()`` gives fresh inputs, and every contender takes them."""

    kernel: str
    shape: str
    make: Callable[[], Sequence[Any]]
    contenders: dict[str, Callable[..., Any]]
    moved: float = 0  # bytes that any way must move, where that is the bound


def cases(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """What a training step of ``shapes`` computes."""
    make = Maker(device, dtype, torch.Generator().manual_seed(0))
    yield from _nf4_cases(make, shapes)
    yield from _lora_cases(make, shapes)
    yield from _pointwise_cases(make, shapes)
    yield _loss_case(make, shapes)


def _nf4_cases(make: Maker, s: Shapes) -> Iterator[Case]:
    weight: Any = make.linear(s.ffn, s.hidden).base.weight  # type: ignore[attr-defined]
    ours, stock = partial(nf4_dequantize.nf4_dequantize, dtype=make.dtype), partial(_stock_values, dtype=make.dtype)
    size = f"{s.ffn}x{s.hidden}"
    moved = weight.nbytes + s.ffn * s.hidden * make.dtype.itemsize
    yield Case("nf4_dequantize", size, lambda: [weight], {"ours": ours, "bitsandbytes": stock}, moved)
    products = {"ours": nf4_linear.product, "bitsandbytes": lambda x, w: F.linear(x, stock(w))}
    for tokens in sorted({1, 16, s.tokens}):
        inputs = partial(_inputs, make, (tokens, s.hidden), weight)
        yield Case("nf4_linear", f"{tokens} tokens, {size}", inputs, products)


def _lora_cases(make: Maker, s: Shapes) -> Iterator[Case]:
    gate, up = (make.linear(s.ffn, s.hidden, s.rank) for _ in range(2))
    down = make.linear(s.hidden, s.ffn, s.rank)
    dense = gate.base.dense(make.dtype)

    def products(x: Tensor, _: Linear) -> Tensor:
        """The least that any way must compute: y, and dx from a gradient of its shape."""
        with torch.no_grad():
            return F.linear(x, dense) @ dense

    what = f"{s.tokens} tokens, {s.ffn}x{s.hidden}, rank {s.rank}"
    ways = {"ours": _step(lora_linear.lora_linear), "eager": _step(lora_linear.reference)}
    for form, base in (("nf4", gate.base), ("plain", _Plain(dense))):
        inputs = partial(_inputs, make, (s.tokens, s.hidden), Linear(base, gate.low_rank))
        yield Case("lora_linear", f"{form}, {what}", inputs, {**ways, "the two products alone": products})
    ways = {"ours": _step(lora_mlp.lora_mlp), "eager": _step(lora_mlp.reference)}
    yield Case("lora_mlp", f"nf4, {what}", partial(_inputs, make, (s.tokens, s.hidden), gate, up, down), ways)


def _pointwise_cases(make: Maker, s: Shapes) -> Iterator[Case]:
    size = make.dtype.itemsize
    inputs = partial(_inputs, make, (s.tokens, s.hidden), make.randn(s.hidden), 1e-5)
    moved = 5 * s.tokens * s.hidden * size
    yield Case("rms_norm", f"{s.tokens}x{s.hidden}", inputs, _ways(rms_norm, "rms_norm"), moved)
    tables = [make.randn(1, s.tokens, s.head_dim) for _ in range(2)]
    inputs = partial(_inputs, make, (1, s.tokens, s.heads, s.head_dim), *tables)
    moved = 4 * s.tokens * s.heads * s.head_dim * size
    yield Case("rope", f"{s.tokens}x{s.heads}x{s.head_dim}", inputs, _ways(rope, "rope"), moved)

    def pair() -> list[Tensor]:
        return [make.randn(s.tokens, s.ffn, trained=True) for _ in range(2)]

    moved = 8 * s.tokens * s.ffn * size
    yield Case("swiglu", f"{s.tokens}x{s.ffn}", pair, _ways(swiglu, "swiglu"), moved)


def _loss_case(make: Maker, s: Shapes) -> Case:
    head, labels = make.randn(s.vocab, s.hidden), torch.arange(s.tokens, device=make.device) % s.vocab
    fused, whole = linear_cross_entropy.linear_cross_entropy, linear_cross_entropy.reference
    ways: dict[str, Any] = {
        "ours": _step(lambda h: fused(h, lambda rows: F.linear(rows, head), labels)),
        "eager": _step(lambda h: whole(h, lambda rows: F.linear(rows, head), labels)),
    }
    liger = _liger("fused_linear_cross_entropy")
    if liger is not None:
        ways["liger-kernel"] = _step(lambda h: liger(h, head, labels))
    inputs = partial(_inputs, make, (s.tokens, s.hidden))
    return Case("linear_cross_entropy", f"{s.tokens} tokens, {s.vocab}x{s.hidden}", inputs, ways)


@dataclass
class _Plain:
    """A frozen linear whose weight is plain."""

    weight: Tensor
    bias: Tensor | None = None
    value_needed: bool = True

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype)

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def transposed_product(self, grad: Tensor, into: Tensor | None = None) -> Tensor:
        return grad @ self.weight if into is None else into.addmm_(grad, self.weight)


def bench(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Iterator[Timing]:
    """Every contender of every case; a kernel that differs from its reference is not timed.

    A contender that fails is reported with its error.
    """
    warm_up(device)
    copy = copy_bandwidth(device)
    for case in cases(shapes, device, dtype):
        error = error_of(case.kernel, device, dtype)
        for name, call in case.contenders.items():
            timing = partial(Timing, case.kernel, case.shape, name)
            if name == "ours" and not error < 0.1:
                yield timing(None, note=f"differs from its reference by {error:.1e}: not timed")
                continue
            try:
                seconds, peak = measure(call, case.make, device)
            except Exception as problem:  # of another library, or out of memory: the others still count
                yield timing(None, note=f"{type(problem).__name__}: {str(problem).splitlines()[0]}")
                continue
            yield timing(seconds, case.moved / seconds / copy if case.moved else None, peak)


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


def as_json(timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """The timings as plain values."""
    return [asdict(timing) for timing in timings]


def _wall(call: Callable[..., Any], inputs: Sequence[Any]) -> float:
    started = time.perf_counter()
    call(*inputs)
    return time.perf_counter() - started


def _inputs(make: Maker, shape: tuple[int, ...], *others: Any) -> list[Any]:
    """A trained input of ``shape`` and the other arguments."""
    return [make.randn(*shape, trained=True), *others]


def _ways(room: Any, name: str) -> dict[str, Callable[..., Any]]:
    """Forward and backward by our kernel, by the reference, the same compiled, and by liger-kernel where it is."""
    ways = {"ours": getattr(room, name), "eager": room.reference, "torch.compile": torch.compile(room.reference)}
    liger = None if name == "rope" else _liger(name)  # its rope takes queries and keys together
    return {way: _step(call) for way, call in (ways | ({"liger-kernel": liger} if liger else {})).items()}


def _step(function: Callable[..., Any]) -> Callable[..., None]:
    """Forward and backward of ``function``, to all that is trained."""

    def call(*inputs: Any) -> None:
        out = function(*inputs)
        linears = [t for i in inputs if isinstance(i, Linear) for t in i.tensors if t is not None]
        torch.autograd.grad(
            out, [t for t in (*inputs, *linears) if isinstance(t, Tensor) and t.requires_grad], torch.ones_like(out)
        )

    return call


def _stock_values(weight: Any, dtype: torch.dtype) -> Tensor:
    """bitsandbytes' two kernels."""
    absmax = torch.ops.bitsandbytes.dequantize_blockwise(
        weight.absmax, weight.nested_absmax, nf4_dequantize.dynamic_code_on(weight.packed.device), 256, torch.float32
    )
    absmax += weight.offset
    return torch.ops.bitsandbytes.dequantize_4bit(weight.packed, absmax, 64, "nf4", list(weight.shape), dtype)


def _liger(name: str) -> Callable[..., Any] | None:
    """The function of liger-kernel, where that is installed."""
    if find_spec("liger_kernel") is None:
        return None
    return getattr(import_module("liger_kernel.transformers.functional"), f"liger_{name}")


def line(timing: Timing) -> str:
    """One timing for the terminal."""
    if timing.seconds is None:
        return f"{timing.kernel:22}{timing.contender:24}{'--':>10}  {timing.shape}: {timing.note}"
    share = "" if timing.of_copy is None else f", {timing.of_copy:.0%} of a copy's bandwidth"
    peak = f", {format_bytes(timing.peak_bytes)}"
    return f"{timing.kernel:22}{timing.contender:24}{1e6 * timing.seconds:>10.0f} us  {timing.shape}{share}{peak}"
