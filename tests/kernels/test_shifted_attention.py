"""Shifted sparse attention against an explicit mask in float64; no leak into the future; the flow between segments."""

import pytest
import torch

from effitrain.kernels.shifted_attention import head_parts, reference, segments_of, shifted_attention
from effitrain.model.attention import attention
from effitrain.model.load import find_base, load_model
from effitrain.planning import recipe

G = 8
# Below, at and beyond one and two groups; tails shorter than half a group.
RAGGED = [(20,), (3,), (8,), (5, 9, 40), (4, 5, 17), (16, 24), (25, 1, 11)]


def _attend(query, key, value, segments):
    return attention(None, query, key, value, None, segments=segments)[0]


def _case(lengths, heads=4, kv_heads=2, dtype=torch.float64):
    sizes = (heads, kv_heads, kv_heads)
    return [torch.randn(1, n, sum(lengths), 6, dtype=dtype, requires_grad=True) for n in sizes]


@pytest.mark.parametrize("lengths", RAGGED)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1), (12, 3), (5, 5), (10, 5), (9, 3), (1, 1)])
def test_equals_the_mask(lengths, heads, kv_heads):
    inputs = _case(lengths, heads, kv_heads)
    results = []
    for out in (shifted_attention(*inputs, lengths, G, _attend), reference(*inputs, lengths, G)):
        torch.manual_seed(3)
        results.append((out, *torch.autograd.grad(out, inputs, torch.randn(out.shape, dtype=out.dtype))))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("lengths", [(11,), (5,), (8,), (9,)])  # G/2 + 1, within a group, one group, one past it
def test_rows_of_a_batch_are_samples(lengths):
    query, key, value = (torch.randn(3, n, *lengths, 6, dtype=torch.float64) for n in (6, 3, 3))
    out = shifted_attention(query, key, value, lengths * 3, G, _attend)
    for row in range(3):
        alone = (t[row : row + 1] for t in (query, key, value))
        torch.testing.assert_close(out[row : row + 1], reference(*alone, lengths, G), rtol=1e-10, atol=1e-10)
    whole = attention(None, query, key, value, None, shifted_group=G)[0]
    assert torch.equal(whole, out)


@pytest.mark.parametrize("lengths", [(20, 3), (4, 9, 33)])
def test_float32_equals_the_mask(lengths):
    inputs = _case(lengths, 9, 3, torch.float32)
    outs = [shifted_attention(*inputs, lengths, G, _attend), reference(*inputs, lengths, G)]
    grads = [torch.autograd.grad(out.square().sum(), inputs) for out in outs]
    for found, wanted in zip((outs[0], *grads[0]), (outs[1], *grads[1]), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_the_segments_of_the_paper():
    assert segments_of([20], G, False) == [8, 8, 4]
    assert segments_of([20], G, True) == [4, 8, 8]
    assert segments_of([8, 9], G, True) == [8, 4, 5]  # one group is whole in both halves
    assert segments_of([21, 3], G, True) == [4, 8, 8, 1, 3]


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (24, 3), (8, 8), (8, 1), (5, 5), (1, 1)])
def test_every_head_has_its_key_and_half(heads, kv_heads):
    seen = []
    for query, shared, shifted in head_parts(heads, kv_heads):
        heads_here, keys = range(heads)[query], range(kv_heads)[shared]
        assert len(heads_here) % len(keys) == 0
        size = len(heads_here) // len(keys)
        seen += [(head, keys[i // size], shifted) for i, head in enumerate(heads_here)]
    assert seen == [(head, head // (heads // kv_heads), head >= heads // 2) for head in range(heads)]


def test_one_group_is_full_causal_attention():
    inputs = _case((30,))
    full = attention(None, *inputs, None, segments=(30,))[0]
    torch.testing.assert_close(shifted_attention(*inputs, (30,), 30, _attend), full, rtol=1e-12, atol=1e-12)


def test_no_token_sees_a_later_one():
    """The rolled form fails here: in its shifted heads the first tokens see the last."""
    query, key, value = _case((37,))
    out = shifted_attention(query, key, value, (37,), G, _attend)
    for t in (0, 3, 4, 12, 35):
        grads = torch.autograd.grad(out[:, : t + 1].sum(), (key, value), retain_graph=True)
        assert not any(g[:, :, t + 1 :].any() for g in grads) and grads[1][:, :, t].any()


def test_samples_together_are_samples_apart():
    lengths = (19, 4, 30)
    inputs = _case(lengths)
    together = shifted_attention(*inputs, lengths, G, _attend).split(lengths, 1)
    apart = zip(*(t.split(lengths, 2) for t in inputs), strict=True)
    for part, out in zip(apart, together, strict=True):
        torch.testing.assert_close(shifted_attention(*part, (out.shape[1],), G, _attend), out, rtol=1e-12, atol=1e-12)


def test_information_flows_through_the_shifted_heads_alone():
    """After two layers the last token knows the first one, by way of the heads whose segments straddle."""
    x = torch.randn(1, 4, 16, 6, dtype=torch.float64)

    def last(x, groups):
        for group in groups:
            x = shifted_attention(x, x, x, (16,), group, _attend).transpose(1, 2)
            x = x.mean(1, keepdim=True).expand(-1, 4, -1, -1)  # heads mix, as the output projection makes them
        return x[0, 0, -1]

    changed = x.clone()
    changed[:, :, 0] += 1
    assert torch.equal(last(x, [G]), last(changed, [G]))
    assert not torch.equal(last(x, [G] * 3), last(changed, [G] * 3))

    def unshifted(x):
        for _ in range(3):
            x = _attend(x, x, x, [G, G]).transpose(1, 2).mean(1, keepdim=True).expand(-1, 4, -1, -1)
        return x[0, 0, -1]

    assert torch.equal(unshifted(x), unshifted(changed))


@torch.no_grad()
def test_in_the_model_it_is_for_training_alone(tiny_model):
    folder = tiny_model("llama")
    asked = recipe(model=str(folder), quant="none", dtype="fp32")
    decoder = load_model(find_base(str(folder)), asked, torch.device("cpu"))
    ids, positions = torch.randint(3, 200, (40,)), torch.arange(40)
    full = decoder.eval()(ids, positions, (40,))
    decoder.set_shifted_group(G)
    assert torch.equal(decoder.eval()(ids, positions, (40,)), full)
    sparse = decoder.train()(ids, positions, (40,))
    assert torch.equal(sparse[:4], full[:4]) or torch.allclose(sparse[:4], full[:4], atol=1e-5)
    assert not torch.allclose(sparse[-1], full[-1], atol=1e-3)
