"""Low-rank updates with every kind of mid against the reference in float64: values, all gradients, what is kept."""

import itertools
from dataclasses import replace

import pytest
import torch

from effitrain.kernels import lora_linear as room
from effitrain.kernels.dropout import dropout
from effitrain.kernels.lora_linear import Linear, lora_linear, lora_linears, reference
from effitrain.kernels.tiles import Tile, tiles_for

MIDS = ["none", "diagonal", "mask", "square", "gate"]
interpreter = pytest.mark.interpreter


@pytest.fixture(params=[False, True], ids=["added", "fused"])
def fused(request, monkeypatch):
    """Both ways to add the update, the fused one in small tiles."""
    tiles = replace(tiles_for(torch.device("cpu")), lora_fused=request.param, lora=Tile(16, 32, 32, 4, 2))
    monkeypatch.setattr(room, "tiles_for", lambda device: replace(tiles, nf4=()))
    monkeypatch.setattr(room, "WIDTHS", 1)  # odd widths too: what is beyond an edge must not count
    return request.param


@interpreter
@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        *((torch.float32, kind) for kind in MIDS),
        (torch.float16, "none"),
        (torch.float16, "gate"),
        (torch.bfloat16, "none"),
    ],
)
@pytest.mark.parametrize(("lead", "out", "inp", "rank", "quantised", "bias"), [
    ((19,), 33, 64, 4, True, False), ((2, 9), 70, 45, 17, False, True),
])  # fmt: skip
def test_kernel(lora, fused, dtype, kind, lead, out, inp, rank, quantised, bias):
    x = torch.randn(*lead, inp).to(dtype).requires_grad_()
    low_rank = lora.update(out, inp, rank, kind, x[..., 0].numel())
    linear = Linear(lora.frozen(out, inp, quantised, bias, dtype), low_rank)
    lora.check(x, [linear], lambda x, parts: lora_linear(x, parts[0]), lambda x, parts: reference(x, parts[0]))
    assert lora_linear(x, linear).grad_fn.name() == "_LoraLinearsBackward"


@interpreter
def test_the_fused_product_is_taken(lora, fused, monkeypatch):
    calls, original = [], room.fused_product
    monkeypatch.setattr(room, "fused_product", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    x = torch.randn(5, 64, requires_grad=True)
    y = lora_linear(x, Linear(lora.frozen(32, 64), lora.update(32, 64, 4)))
    torch.autograd.grad(y.sum(), x)
    assert len(calls) == (2 if fused else 0)


@interpreter
@pytest.mark.parametrize(
    ("tokens", "rank", "out", "inp"), [(4, 4, 32, 64), (9, 129, 32, 64), (9, 4, 33, 64), (9, 4, 32, 70)]
)
def test_few_tokens_high_ranks_and_odd_widths_are_left_to_cublas(lora, monkeypatch, tokens, rank, out, inp):
    tiles = replace(tiles_for(torch.device("cpu")), lora_fused=True)
    tiles = replace(tiles, nf4=((4, Tile(16, 64, 64, 4, 3)),))
    monkeypatch.setattr(room, "tiles_for", lambda device: tiles)
    monkeypatch.setattr(room, "fused_product", None)
    x = torch.randn(tokens, inp, requires_grad=True)
    linear = Linear(lora.frozen(out, inp), lora.update(out, inp, rank))
    lora.check(x, [linear], lambda x, parts: lora_linear(x, parts[0]), lambda x, parts: reference(x, parts[0]))


@interpreter
def test_groups_of_tiles_and_a_depth_that_is_no_whole_tile(lora, fused):
    if not fused:
        pytest.skip("only our own product has tiles")
    x = torch.randn(200, 50, requires_grad=True)  # 13 rows of tiles: a whole group and a part of one
    linear = Linear(lora.frozen(70, 50, False, True), lora.update(70, 50, 5))
    lora.check(x, [linear], lambda x, parts: lora_linear(x, parts[0]), lambda x, parts: reference(x, parts[0]))


@interpreter
def test_several_linears_on_one_input(lora, fused):
    x = torch.randn(1, 21, 64, requires_grad=True)
    linears = [Linear(lora.frozen(n, 64), lora.update(n, 64, 4) if n != 40 else None) for n in (48, 40, 33)]
    lora.check(x, linears, lora_linears, lambda x, parts: tuple(reference(x, part) for part in parts))


@interpreter
@pytest.mark.parametrize("kind", ["none", "square"])
def test_dropout_is_drawn_again(lora, fused, kind):
    x = torch.randn(1, 30, 64, requires_grad=True)
    linear = Linear(lora.frozen(48, 64), lora.update(48, 64, 4, kind, dropout=0.4, seed=77))
    assert (dropout(x, 0.4, 77) == 0).float().mean() > 0.3
    lora.check(x, [linear], lambda x, parts: lora_linear(x, parts[0]), lambda x, parts: reference(x, parts[0]))


@interpreter
@pytest.mark.parametrize("trained", list(itertools.product([False, True], repeat=3)))
def test_what_is_kept_and_what_gets_a_gradient(lora, trained):
    """x only where A is trained: that is what makes frozen-A methods lean (variants with A fixed)."""
    x = torch.randn(6, 64, requires_grad=True)
    low_rank = lora.update(32, 64, 4, "diagonal")
    for tensor, wanted in zip((low_rank.A, low_rank.B, low_rank.mid), trained, strict=True):
        tensor.requires_grad_(wanted)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        y = lora_linear(x, Linear(lora.frozen(32, 64), low_rank))
    assert sorted(kept) == sorted([(6, 4)] + [(6, 64)] * trained[0])
    y.sum().backward()
    assert [t.grad is not None for t in (low_rank.A, low_rank.B, low_rank.mid)] == list(trained)


@interpreter
def test_the_output_may_be_changed_in_place(lora):
    """As the loss does with the logits of an adapted head."""
    x = torch.randn(2, 3, 64, requires_grad=True)
    y = lora_linear(x, Linear(lora.frozen(32, 64, False, True), lora.update(32, 64, 4)))
    y.detach().zero_()
    torch.autograd.grad(y, x, torch.randn_like(y))
    y = lora_linear(x, Linear(lora.frozen(32, 64, False, True), lora.update(32, 64, 4)))
    torch.autograd.grad(y.add_(1), x, torch.ones(2, 3, 32))


@interpreter
def test_a_value_that_nobody_reads(lora, fused):
    x = torch.randn(6, 64, requires_grad=True)
    linear = Linear(lora.frozen(32, 64), lora.update(32, 64, 4))
    inputs, grad = (x, *linear.tensors[:2]), torch.randn(6, 32)
    wanted = torch.autograd.grad(lora_linear(x, linear), inputs, grad)
    with linear.base.value_unused():
        y = lora_linear(x, linear)
    assert not y.any()
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(y, inputs, grad), wanted, strict=True))


@pytest.mark.parametrize("kind", MIDS)
def test_reference_and_its_gradients(plain, lora, kind):
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    linear = lora.doubled(Linear(lora.frozen(9, 12, False), lora.update(9, 12, 3, kind, 5)), torch.float32)
    tensors = [t for t in linear.tensors if t is not None and t.requires_grad]
    assert torch.autograd.gradcheck(lambda x, *_: lora_linear(x, linear), (x, *tensors))
    A, B, mid = linear.tensors
    apply = {"none": lambda z: z, "square": lambda z: z @ mid.T}.get(kind, lambda z: z * mid)
    torch.testing.assert_close(lora_linear(x, linear), x @ linear.base.weight.T + 0.7 * apply(x @ A.T) @ B.T)
