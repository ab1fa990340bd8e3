"""Fused head and loss on a card against whole logits in float64 on the CPU."""

import pytest
import torch
from torch import nn

from effitrain.kernels.linear_cross_entropy import IGNORED, linear_cross_entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
]


# In halves the logits are rounded to their dtype before the loss, and so is their gradient.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize(("tokens", "hidden", "vocab"), [(1, 16, 5), (33, 16, 101), (300, 64, 1000)])
@pytest.mark.parametrize("masked", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1, 2**26])
def test_equals_whole_logits(dtype, tolerance, tokens, hidden, vocab, masked, trainable, chunk_bytes):
    head = nn.Linear(hidden, vocab, bias=False, dtype=dtype, device="cuda").requires_grad_(trainable)
    h = torch.randn(tokens, hidden, dtype=dtype, device="cuda", requires_grad=True)
    labels = torch.randint(vocab, (tokens,))
    labels[torch.rand(tokens) < masked] = IGNORED
    parameters = list(head.parameters()) if trainable else []
    loss = linear_cross_entropy(h, head, labels.cuda(), parameters, chunk_bytes)
    grads = torch.autograd.grad(loss, [h, *parameters])

    exact = [h.detach().cpu().double().requires_grad_(), head.weight.detach().cpu().double().requires_grad_()]
    logits = exact[0] @ exact[1].T
    wanted = nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    wanted_grads = torch.autograd.grad(wanted, exact)[: len(grads)]
    assert loss.dtype == torch.float32 and loss.is_cuda
    assert [g.dtype for g in grads] == [dtype] * len(grads)
    for found, want in zip((loss, *grads), (wanted, *wanted_grads), strict=True):
        assert (found.detach().cpu().double() - want).abs().max() <= tolerance * want.abs().max()


def test_whole_logits_are_never_alive():
    tokens, hidden, vocab = 4096, 64, 32768
    head = nn.Linear(hidden, vocab, bias=False, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    h = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(vocab, (tokens,), device="cuda")
    linear_cross_entropy(h[:64], head, labels[:64]).backward()  # libraries make their workspaces
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(h, head, labels, chunk_bytes=2**24).backward()
    # Of a chunk: logits and their gradient in bf16, the same in fp32, temporaries; whole logits would be 256 MiB.
    assert torch.cuda.max_memory_allocated() - before < 4 * 2**24
