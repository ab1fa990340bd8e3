"""Rotary embedding: the reference as transformers has it, with scaled tables; the kernel against float64."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from effitrain.kernels.rope import reference, rope

TOLERANCES = [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)]
SCALINGS = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 64},
]  # fmt: skip
interpreter = pytest.mark.interpreter


def _tables(batch, length, dim, scaling=SCALINGS[0], dtype=torch.float32):
    config = LlamaConfig(
        hidden_size=dim, num_attention_heads=1, head_dim=dim, rope_parameters={"rope_theta": 1e4, **scaling}
    )
    positions = torch.randint(200, (batch, length))
    return LlamaRotaryEmbedding(config)(torch.empty(1, dtype=dtype), positions)


def _exact(x, cos, sin, interleaved):
    """Each pair as a complex number times exp(i angle)."""
    x, half = x.detach().double(), x.shape[-1] // 2
    turn = torch.complex(cos.double(), sin.double())[..., None, :half]
    if interleaved:
        return torch.view_as_real(torch.complex(x[..., ::2], x[..., 1::2]) * turn).flatten(-2)
    y = torch.complex(x[..., :half], x[..., half:]) * turn
    return torch.cat([y.real, y.imag], -1)


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s["rope_type"])
def test_reference_is_transformers(plain, scaling):
    q = torch.randn(2, 5, 3, 16)
    cos, sin = _tables(2, 5, 16, scaling)
    stock, _ = apply_rotary_pos_emb(q.transpose(1, 2), q.transpose(1, 2), cos, sin)
    assert torch.equal(rope(q, cos, sin), stock.transpose(1, 2))


@interpreter
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("batch", "length", "heads", "dim"), [(1, 1, 1, 2), (1, 7, 3, 16), (2, 3, 17, 6), (3, 2, 20, 24)]
)
def test_kernel(close, batch, length, heads, dim, interleaved, dtype, tolerance):
    x = torch.randn(batch, length, heads, dim).to(dtype).requires_grad_()
    grad = torch.randn(batch, length, heads, dim).to(dtype)
    for cos, sin in (_tables(batch, length, dim, SCALINGS[2], dtype), _tables(1, length, dim, SCALINGS[1], dtype)):
        y = rope(x, cos, sin, interleaved)
        assert y.grad_fn.name() == "_RopeBackward" and y.dtype == dtype
        close(y, _exact(x, cos, sin, interleaved), tolerance)
        close(reference(x.double(), cos.double(), sin.double(), interleaved), _exact(x, cos, sin, interleaved), 1e-12)
        (dx,) = torch.autograd.grad(y, x, grad)
        close(dx, _exact(grad, cos, -sin, interleaved), tolerance)


@interpreter
def test_turns_a_view_and_keeps_only_the_tables():
    x = torch.randn(1, 5, 2 * 16, requires_grad=True)
    cos, sin = _tables(1, 5, 8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        y = rope(x.view(1, 5, 4, 8)[:, :, 1:3], cos, sin)
    assert set(kept) == {cos.data_ptr(), sin.data_ptr()}
    torch.testing.assert_close(y, reference(x.view(1, 5, 4, 8)[:, :, 1:3], cos, sin), rtol=1e-6, atol=1e-6)
