"""What the tests of kernels share: Triton's interpreter, poisoned outputs between guards, comparisons in float64.

The interpreter must be chosen before a kernel is defined, so tests marked ``interpreter`` have a process of their own:
TRITON_INTERPRET=1 pytest -m interpreter tests/kernels. ``scripts/test.sh`` does both.
"""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from effitrain.core.spec import Axis, LinearSpec
from effitrain.kernels import backend
from effitrain.kernels.lora_linear import Linear, LowRank
from effitrain.quant.linear import FrozenLinear
from effitrain.quant.nf4 import quantize

GUARD = 64  # elements before and behind an output
# float32 sums of up to 130 products; the halves round x, low and y, and the interpreter chops bfloat16.
TOLERANCES = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 3e-2}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test of a kernel says so where it cannot run."""
    if item.get_closest_marker("interpreter") and not backend.INTERPRETED:
        pytest.skip("runs Triton's interpreter, in a process of its own: TRITON_INTERPRET=1 pytest -m interpreter")


@pytest.fixture(autouse=True)
def _poisoned(request, monkeypatch):
    """In interpreter tests fresh memory is NaN between guards, so a cell that is not written, or one beside an output
    that is, shows.
    """
    if not request.node.get_closest_marker("interpreter"):
        yield
        return
    empty, guarded = torch.empty, []

    def poisoned(*size, **kwargs):
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        if torch.device(kwargs.get("device") or "cpu").type != "cpu" or "out" in kwargs:
            return empty(*size, **kwargs)
        kwargs.pop("memory_format", None)
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
        poison = float("nan") if dtype.is_floating_point else 77
        whole = empty(shape.numel() + 2 * GUARD, **kwargs).fill_(poison)
        before = whole.clone()
        guarded.append((whole, before))
        return whole[GUARD : GUARD + shape.numel()].view(shape)

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(
        torch, "empty_like", lambda t, dtype=None: poisoned(t.shape, dtype=dtype or t.dtype, device=t.device)
    )
    yield
    monkeypatch.undo()
    for whole, before in guarded:
        for part in (slice(None, GUARD), slice(-GUARD, None)):
            assert torch.equal(whole[part].view(torch.uint8), before[part].view(torch.uint8)), (
                "written beside an output"
            )


@pytest.fixture
def plain(monkeypatch):
    """The references in place of the kernels, in the interpreter's process too."""
    monkeypatch.setattr(backend, "INTERPRETED", False)


@pytest.fixture(scope="session")
def close():
    """``close(found, wanted, tolerance)``: no value is further off than this share of the largest wanted one."""

    def compare(found, wanted, tolerance):
        assert found.shape == wanted.shape
        error = (found.detach().double() - wanted.detach().double()).abs().max()
        assert error <= tolerance * wanted.detach().abs().max() + 1e-30, f"off by {error / wanted.abs().max():.1e}"

    return compare


@pytest.fixture(scope="session")
def lora(close):
    """Builders of frozen linears with updates, and their comparison with a reference in float64."""
    return SimpleNamespace(frozen=frozen, update=update, doubled=doubled, check=partial(check, close))


def frozen(out, inp, quantised=True, bias=False, dtype=torch.float32):
    """A random frozen linear."""
    linear = FrozenLinear(LinearSpec("p", Axis.FFN, Axis.MODEL, out, inp, bias))
    weight = torch.randn(out, inp) / inp**0.5
    linear.weight = quantize(weight) if quantised else weight.to(dtype)
    linear.bias = torch.randn(out).to(dtype) if bias else None
    return linear


def update(out, inp, rank, kind="none", tokens=1, **fields):
    """A random update with trainable float32 tensors."""
    shape = {"diagonal": (rank,), "mask": (rank,), "square": (rank, rank), "gate": (tokens, rank)}.get(kind)
    mid = None if shape is None else torch.randn(shape)
    if mid is not None:
        mid = (mid > 0).float() if kind == "mask" else mid.requires_grad_()
    A, B = torch.randn(rank, inp) / inp**0.5, torch.randn(out, rank)
    return LowRank(A.requires_grad_(), B.requires_grad_(), 0.7, mid, kind == "square", **fields)


def doubled(linear, dtype):
    """The same in float64, of the weight as it is in ``dtype``."""
    base = FrozenLinear(linear.base.spec)
    base.weight = linear.base.dense(dtype).double()
    base.bias = None if linear.base.bias is None else linear.base.bias.double()
    low = linear.low_rank
    if low is None:
        return Linear(base)
    tensors = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in linear.tensors]
    return Linear(base, replace(low, A=tensors[0], B=tensors[1], mid=tensors[2]))


def check(close, x, linears, function, exact_function):
    """Values and gradients of ``function(x, linears)`` against ``exact_function`` in float64."""
    exact_x, exact = x.detach().double().requires_grad_(), [doubled(linear, x.dtype) for linear in linears]
    results = []
    for inp, parts, call in ((x, linears, function), (exact_x, exact, exact_function)):
        outputs = call(inp, parts)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.manual_seed(1)
        grads = [torch.randn(y.shape).to(x.dtype).to(y.dtype) for y in outputs]
        inputs = [inp, *(t for part in parts for t in part.tensors if t is not None and t.requires_grad)]
        results.append((*outputs, *torch.autograd.grad(outputs, inputs, grads)))
    for found, wanted in zip(*results, strict=True):
        close(found, wanted, TOLERANCES[x.dtype])
    assert results[0][0].dtype == x.dtype
    assert [g.dtype for g in results[0][-len(inputs) :]] == [x.dtype] + [torch.float32] * (len(inputs) - 1)
