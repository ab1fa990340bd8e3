"""Attention on a card against a plain softmax in float64: segments, grouped heads, sliding windows, gradients."""

import pytest
import torch

from effitrain.kernels.shifted_attention import reference
from effitrain.model import attention as room
from effitrain.model.attention import attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
]
CUDA = torch.device("cuda")
UNEQUAL, EQUAL = (5, 64, 1, 130, 17), (48, 48, 48)


def _case(heads, kv_heads, tokens, dim, dtype):
    """Query, key, value [1, H, T, D] in the layout transformers hands over: a transposed [1, T, H, D]."""
    shapes = ((heads, tokens), (kv_heads, tokens), (kv_heads, tokens))
    tensors = [torch.randn(1, t, h, dim, device=CUDA).to(dtype).transpose(1, 2) for h, t in shapes]
    return [tensor.requires_grad_() for tensor in tensors]


def _plain(query, key, value, segments, scaling, window):
    """Causal attention inside each segment, [1, T, H, D], by its definition."""
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    parts = []
    for q, k, v in zip(*(t.split(list(segments), 2) for t in (query, key, value)), strict=True):
        behind = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
        hidden = (behind < 0) | (behind >= (window or q.shape[2]))
        scores = (scaling * q @ k.transpose(2, 3)).masked_fill(hidden, -torch.inf)
        parts.append(scores.softmax(-1) @ v)
    return torch.cat(parts, 2).transpose(1, 2)


# Halves round probabilities, outputs and gradients, to 8 bits in bf16; fp32 kernels use three TF32 products for one.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 5e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("segments", [UNEQUAL, EQUAL, (200,)])
@pytest.mark.parametrize("window", [None, 7, 100])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 16), (8, 2, 64), (6, 1, 128)])
def test_equals_a_plain_softmax(dtype, tolerance, segments, window, heads, kv_heads, dim):
    inputs = _case(heads, kv_heads, sum(segments), dim, dtype)
    out, _ = attention(None, *inputs, None, segments=segments, scaling=0.2, sliding_window=window)
    grad = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, grad)

    exact = [t.detach().cpu().double().requires_grad_() for t in inputs]
    wanted = _plain(*exact, segments, 0.2, window)
    wanted_grads = torch.autograd.grad(wanted, exact, grad.cpu().double())
    assert out.shape == wanted.shape and out.dtype == dtype
    for found, want in zip((out, *grads), (wanted, *wanted_grads), strict=True):
        error = (found.detach().cpu().double() - want).abs().max() / want.abs().max()
        assert error < tolerance, error


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("segments", [UNEQUAL, EQUAL, (200,)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (9, 3)])
def test_shifted_groups_equal_the_mask(dtype, tolerance, segments, heads, kv_heads):
    inputs = _case(heads, kv_heads, sum(segments), 64, dtype)
    out, _ = attention(None, *inputs, None, segments=segments, shifted_group=32)
    grad = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, grad)
    exact = [t.detach().cpu().double().requires_grad_() for t in inputs]
    wanted = reference(*exact, segments, 32)
    wanted_grads = torch.autograd.grad(wanted, exact, grad.cpu().double())
    for found, want in zip((out, *grads), (wanted, *wanted_grads), strict=True):
        error = (found.detach().cpu().double() - want).abs().max() / want.abs().max()
        assert error < tolerance, error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_perturbing_one_segment_leaves_the_others_bit_identical(dtype):
    inputs = _case(8, 2, sum(UNEQUAL), 64, dtype)
    before = attention(None, *inputs, None, segments=UNEQUAL)[0].split(UNEQUAL, 1)
    starts = torch.tensor([0, *UNEQUAL]).cumsum(0).tolist()
    for k in range(len(UNEQUAL)):
        changed = [t.clone() for t in inputs]
        for tensor in changed:
            tensor[:, :, starts[k] : starts[k + 1]] *= 3
        after = attention(None, *changed, None, segments=UNEQUAL)[0].split(UNEQUAL, 1)
        same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert same == [i != k for i in range(len(UNEQUAL))]


def test_unequal_segments_take_the_kernel_for_them(monkeypatch):
    if room._varlen() is None or torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this torch or this card has no attention over segments of different lengths")
    calls, original = [], room._varlen_segments
    monkeypatch.setattr(room, "_varlen_segments", lambda *args: calls.append(1) or original(*args))
    for dtype in (torch.bfloat16, torch.float32):  # flash attention has no fp32
        attention(None, *_case(4, 2, sum(UNEQUAL), 64, dtype), None, segments=UNEQUAL)
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 5])
@torch.no_grad()
def test_with_a_cache_the_last_query_sees_the_last_key(dtype, window):
    query, key, value = _case(4, 2, 40, 64, dtype)
    whole, _ = attention(None, query, key, value, None, sliding_window=window)
    for start in (39, 30):
        part, _ = attention(None, query[:, :, start:], key, value, None, sliding_window=window)
        torch.testing.assert_close(part, whole[:, start:], rtol=2e-2, atol=2e-2)
