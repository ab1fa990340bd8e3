"""Products with an NF4 weight, fused and not, both ways, against the dequantised weight in float64."""

from dataclasses import replace

import pytest
import torch

from effitrain.kernels import nf4_linear as room
from effitrain.kernels.nf4_dequantize import reference
from effitrain.kernels.nf4_linear import nf4_linear, transposed_product
from effitrain.kernels.tiles import Tile, tiles_for
from effitrain.quant.nf4 import quantize

# Sums of up to 192 products; the halves round weight and result, the interpreter chops bfloat16.
TOLERANCES = [(torch.float32, 2e-6), (torch.float16, 1e-3), (torch.bfloat16, 2e-2)]
FEW, MANY = Tile(16, 32, 64, 4, 2), Tile(32, 64, 128, 4, 2)
interpreter = pytest.mark.interpreter


@pytest.fixture
def tiles(monkeypatch):
    """Small tiles, so that small shapes have several, and ragged ones; another for more than eight tokens."""
    changed = replace(tiles_for(torch.device("cpu")), nf4=((8, FEW), (300, MANY)))
    monkeypatch.setattr(room, "tiles_for", lambda device: changed)
    monkeypatch.setattr(room, "WIDTHS", 1)  # odd widths too: what is beyond an edge must not count


def _case(tokens, out, inp, dtype, bias):
    weight = quantize(torch.randn(out, inp))
    x, grad = torch.randn(*tokens, inp).to(dtype).requires_grad_(), torch.randn(*tokens, out).to(dtype)
    return x, weight, torch.randn(out).to(dtype) if bias else None, grad


def _check(close, x, weight, bias, grad, tolerance):
    y = nf4_linear(x, weight, bias)
    (dx,) = torch.autograd.grad(y, x, grad)
    dense = reference(weight, x.dtype).double()
    assert y.dtype == dx.dtype == x.dtype
    close(y, x.double() @ dense.T + (0 if bias is None else bias.double()), tolerance)
    close(dx, grad.double() @ dense, tolerance)


@interpreter
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize(("tokens", "out", "inp", "bias"), [
    ((1,), 1, 64, False), ((5,), 33, 64, True), ((2, 9), 70, 192, False), ((40,), 96, 192, True), ((290,), 3, 64, True),
])  # fmt: skip
def test_fused(close, tiles, monkeypatch, tokens, out, inp, bias, dtype, tolerance):
    monkeypatch.setattr(room, "nf4_dequantize", None)  # the weight is never written out
    _check(close, *_case(tokens, out, inp, dtype, bias), tolerance)


@interpreter
@pytest.mark.parametrize("tokens", [5, 30, 301])
def test_a_gradient_is_added_to_what_is_there(close, tiles, tokens):
    _, weight, _, grad = _case((tokens,), 45, 64, torch.float32, False)
    buffer = torch.randn(tokens, 64)
    wanted = buffer.double() + grad.double() @ reference(weight, torch.float32).double()
    assert transposed_product(grad, weight, buffer).data_ptr() == buffer.data_ptr()
    close(buffer, wanted, 2e-6)


@interpreter
@pytest.mark.parametrize(("tokens", "out", "inp"), [(301, 32, 64), (3, 32, 96), (3, 32, 7), (3, 30, 64)])
def test_many_tokens_and_rows_that_are_no_whole_blocks(close, tiles, monkeypatch, tokens, out, inp):
    monkeypatch.setattr(room, "_nf4_linear", None)
    monkeypatch.setattr(room, "WIDTHS", 16)
    _check(close, *_case((tokens,), out, inp, torch.float32, True), 2e-6)


def test_the_table_says_which_tile():
    tiles = replace(tiles_for(torch.device("cpu")), nf4=((8, FEW), (300, MANY)))
    assert [tiles.nf4_tile(n) for n in (0, 1, 8, 9, 300, 301)] == [FEW, FEW, FEW, MANY, MANY, None]


@interpreter
@pytest.mark.parametrize("tokens", [3, 20])
def test_no_nan_comes_from_beyond_the_last_row(tiles, tokens):
    """What lies behind the tensors in memory is never multiplied in, not even by zero."""
    x, weight, _, grad = _case((tokens,), 37, 64, torch.float32, False)
    behind = torch.full((40, 64), float("nan"))
    behind[:tokens] = x.detach()
    rows = behind[:tokens].requires_grad_()
    y = nf4_linear(rows, weight)
    assert y.isfinite().all() and torch.autograd.grad(y, rows, grad)[0].isfinite().all()


@pytest.mark.parametrize("bias", [False, True])
def test_without_kernels(plain, close, bias):
    x, weight, b, grad = _case((2, 5), 33, 96, torch.float32, bias)
    _check(close, x, weight, b, grad, 2e-6)
    assert torch.equal(nf4_linear(x, weight, b), room.reference(x, weight, b))
