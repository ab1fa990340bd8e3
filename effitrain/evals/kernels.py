"""Every kernel against its reference on one device: what the doctor runs on the user's card, and a benchmark before it
times. Outputs and gradients at ragged shapes; the reference computes in float32 from the same inputs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from effitrain.core.spec import Axis, LinearSpec
from effitrain.io.synthetic import SyntheticCheckpoint
from effitrain.kernels import (
    dropout,
    linear_cross_entropy,
    lora_linear,
    lora_mlp,
    lora_qkv,
    nf4_dequantize,
    nf4_linear,
    rms_norm,
    rope,
    swiglu,
)
from effitrain.kernels.backend import usable
from effitrain.kernels.lora_linear import Linear, LowRank
from effitrain.kernels.tiles import tiles_for
from effitrain.quant.linear import FrozenLinear

# Share of the largest value of a result: sums of up to 512 products in another order, and for halves the rounding of
# inputs between two products to 11 and 8 bits.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
TOKENS, HIDDEN, FFN, RANK, HEADS, DIM = 77, 128, 320, 8, 6, 32


@dataclass(frozen=True)
class Maker:
    """Makes the inputs of one check: the same numbers whatever was drawn before."""

    device: torch.device
    dtype: torch.dtype
    source: torch.Generator

    def randn(self, *shape: int, trained: bool = False, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers, of the dtype of training by default."""
        values = torch.randn(shape, generator=self.source).to(self.device, dtype or self.dtype)
        return values.requires_grad_(trained)

    def linear(self, out: int, inp: int, rank: int = RANK) -> Linear:
        """A frozen NF4 linear with a low-rank update."""
        base = FrozenLinear(LinearSpec("p", Axis.FFN, Axis.MODEL, out, inp, False))
        weights = SyntheticCheckpoint({"p_proj.weight": (out, inp)}, out * inp, True, self.dtype)
        base.weight = weights.read_nf4("p_proj.weight", self.device)
        A = (self.randn(rank, inp, dtype=torch.float32) / inp**0.5).requires_grad_()
        return Linear(base, LowRank(A, self.randn(out, rank, trained=True, dtype=torch.float32), 0.5))


Results = tuple[Sequence[Tensor], Sequence[Tensor]]


def _both(kernel: Callable[..., Any], reference: Callable[..., Any], inputs: Sequence[Tensor], *fixed: Any) -> Results:
    """Outputs and gradients of two functions of ``inputs`` and of the same arguments after them."""
    results = []
    wide = [t.detach().float().requires_grad_(t.requires_grad) for t in inputs]
    for function, given in ((kernel, inputs), (reference, wide)):
        outputs = function(*given, *fixed)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        trained = [t for t in (*given, *_tensors(fixed)) if t.requires_grad]
        grads = [torch.cos(torch.arange(y.numel(), device=y.device)).view(y.shape).to(y.dtype) for y in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, trained, grads)])
    return results[0], results[1]


def _tensors(fixed: Sequence[Any]) -> list[Tensor]:
    return [t for f in fixed if isinstance(f, Linear) for t in f.tensors if t is not None]


def _nf4_dequantize(make: Maker) -> Results:
    weight = make.linear(FFN, HIDDEN).base.weight  # type: ignore[attr-defined]
    return [nf4_dequantize.nf4_dequantize(weight, make.dtype)], [nf4_dequantize.reference(weight, make.dtype)]


def _nf4_linear(make: Maker) -> Results:
    weight = make.linear(FFN, HIDDEN).base.weight  # type: ignore[attr-defined]
    fused = [most for most, _ in tiles_for(make.device).nf4]  # each range of tokens has a tile of its own
    results = [
        _both(nf4_linear.nf4_linear, nf4_linear.reference, [make.randn(tokens, HIDDEN, trained=True)], weight)
        for tokens in (1, *(most - 3 for most in fused), max(fused, default=0) + 13)
    ]
    found, wanted = zip(*results, strict=True)
    return [*chain(*found)], [*chain(*wanted)]


def _lora_linear(make: Maker) -> Results:
    linear = make.linear(FFN, HIDDEN)
    return _both(lora_linear.lora_linear, lora_linear.reference, [make.randn(TOKENS, HIDDEN, trained=True)], linear)


def _lora_qkv(make: Maker) -> Results:
    linears = [make.linear(width, HIDDEN) for width in (HIDDEN, 64, 64)]
    return _both(lora_qkv.lora_qkv, lora_qkv.reference, [make.randn(TOKENS, HIDDEN, trained=True)], *linears)


def _lora_mlp(make: Maker) -> Results:
    linears = [make.linear(*shape) for shape in ((FFN, HIDDEN), (FFN, HIDDEN), (HIDDEN, FFN))]
    return _both(lora_mlp.lora_mlp, lora_mlp.reference, [make.randn(TOKENS, HIDDEN, trained=True)], *linears)


def _rms_norm(make: Maker) -> Results:
    inputs = [make.randn(TOKENS, HIDDEN + 7, trained=True), make.randn(HIDDEN + 7, trained=True)]
    return _both(rms_norm.rms_norm, rms_norm.reference, inputs, 1e-5)


def _rope(make: Maker) -> Results:
    angles = make.randn(1, TOKENS, DIM // 2, dtype=torch.float32).repeat(1, 1, 2)
    tables = angles.cos().to(make.dtype), angles.sin().to(make.dtype)
    return _both(rope.rope, rope.reference, [make.randn(1, TOKENS, HEADS, DIM, trained=True)], *tables)


def _swiglu(make: Maker) -> Results:
    inputs = [make.randn(TOKENS, FFN, trained=True) for _ in range(2)]
    silu, gelu = (_both(swiglu.swiglu, swiglu.reference, inputs, name) for name in ("silu", "gelu"))
    return [*silu[0], *gelu[0]], [*silu[1], *gelu[1]]


def _dropout(make: Maker) -> Results:
    return _both(dropout.dropout, dropout.reference, [make.randn(TOKENS, HIDDEN, trained=True)], 0.3, 5)


def _linear_cross_entropy(make: Maker) -> Results:
    weight, labels = make.randn(5 * FFN, HIDDEN), torch.arange(TOKENS, device=make.device)
    labels[::3] = linear_cross_entropy.IGNORED
    hidden = make.randn(TOKENS, HIDDEN, trained=True)
    return _both(
        linear_cross_entropy.linear_cross_entropy,
        linear_cross_entropy.reference,
        [hidden],
        lambda rows: F.linear(rows, weight.to(rows.dtype)),
        labels,
    )


CHECKS: Mapping[str, Callable[[Maker], Results]] = {
    "nf4_dequantize": _nf4_dequantize,
    "nf4_linear": _nf4_linear,
    "lora_linear": _lora_linear,
    "lora_qkv": _lora_qkv,
    "lora_mlp": _lora_mlp,
    "rms_norm": _rms_norm,
    "rope": _rope,
    "swiglu": _swiglu,
    "dropout": _dropout,
    "linear_cross_entropy": _linear_cross_entropy,
}


def error_of(kernel: str, device: torch.device, dtype: torch.dtype) -> float:
    """The largest difference between a kernel and its reference, as a share of each result's largest value, or NaN."""
    found, wanted = CHECKS[kernel](Maker(device, dtype, torch.Generator().manual_seed(0)))
    pairs = zip(found, wanted, strict=True)
    errors = [(a.float() - b.float()).abs().max() / b.float().abs().max() for a, b in pairs]
    return torch.stack(errors).max().item()


def wrong_kernels(device: torch.device, dtypes: Sequence[torch.dtype]) -> dict[str, float]:
    """The kernels that differ from their reference by more than rounding, and by how much; those that raise by NaN."""
    wrong = {}
    for kernel in CHECKS:
        for dtype in dtypes:
            try:
                error = error_of(kernel, device, dtype)
            except Exception:  # a compiler or launch error of this card: the kernel cannot be used, whatever it is
                error = math.nan
            if not error <= TOLERANCES[dtype]:
                wrong[kernel] = error
    return wrong


def runs_on(device: torch.device) -> bool:
    """Whether any kernel would run there at all."""
    return usable("", torch.empty(0, device=device))
