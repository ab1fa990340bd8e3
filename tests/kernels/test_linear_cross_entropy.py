"""Fused head and loss against whole logits in float64: outputs, gradients, and what is never allocated."""

import pytest
import torch
from torch import nn

from effitrain.kernels import linear_cross_entropy as room
from effitrain.kernels.linear_cross_entropy import IGNORED, linear_cross_entropy, reference
from effitrain.kernels.lora_linear import Linear, lora_linear
from effitrain.kernels.lora_linear import reference as lora_reference
from effitrain.train.memory import StorageTracker


def _case(tokens, hidden, vocab, masked, dtype=torch.float64):
    h = torch.randn(tokens, hidden, dtype=dtype, requires_grad=True)
    head = nn.Linear(hidden, vocab, bias=False, dtype=dtype)
    labels = torch.randint(vocab, (tokens,))
    labels[torch.rand(tokens) < masked] = IGNORED
    return h, head, labels


@pytest.mark.parametrize("tokens,hidden,vocab", [(1, 3, 5), (17, 8, 11), (33, 16, 101), (130, 24, 97)])
@pytest.mark.parametrize("masked", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1, 4 * 97 * 20, 2**26])
def test_equals_whole_logits(tokens, hidden, vocab, masked, trainable, chunk_bytes):
    h, head, labels = _case(tokens, hidden, vocab, masked, torch.float32)
    head.requires_grad_(trainable)
    parameters = list(head.parameters()) if trainable else []
    loss = linear_cross_entropy(h, head, labels, parameters, chunk_bytes)
    grads = torch.autograd.grad(3 * loss, [h, *parameters])

    h64, head64 = h.detach().double().requires_grad_(), nn.Linear(hidden, vocab, bias=False, dtype=torch.float64)
    head64.load_state_dict({"weight": head.weight.detach().double()})
    # An all-masked batch has loss 0 and gradient 0 on both sides.
    expected = torch.nn.functional.cross_entropy(head64(h64), labels, ignore_index=IGNORED, reduction="sum")
    wanted = torch.autograd.grad(3 * expected, [h64, *head64.parameters()][: len(grads)])
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad.double(), want, rtol=1e-4, atol=1e-5)


def test_reference_is_the_sum_of_cross_entropies():
    h, head, labels = _case(9, 4, 7, 0.3)
    z = head(h)
    picked = [-z[i].log_softmax(-1)[c] for i, c in enumerate(labels) if c != IGNORED]
    torch.testing.assert_close(reference(h, head, labels), torch.stack(picked).sum().float())


def test_no_gradient_means_no_gradient_work():
    h, head, labels = _case(20, 4, 7, 0.3, torch.float32)
    calls = []
    head.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    with torch.no_grad():
        loss = linear_cross_entropy(h, head, labels)
    assert not loss.requires_grad and calls


def test_whole_logits_are_never_alive(plain):
    tokens, hidden, vocab = 512, 8, 4096
    h, head, labels = _case(tokens, hidden, vocab, 0.5, torch.float32)
    head.requires_grad_(False)
    with StorageTracker() as tracker:
        linear_cross_entropy(h, head, labels, chunk_bytes=16 * vocab * 4).backward()
    # two chunks of 16 rows, logits and the gemm's own output, and the gradient of the hidden states
    assert tracker.peak < 4 * 16 * vocab * 4 + 4 * h.nbytes < tokens * vocab * 4 / 4


def test_half_precision_hidden_keeps_its_dtype():
    h = torch.randn(40, 8, dtype=torch.bfloat16, requires_grad=True)
    head = nn.Linear(8, 50, bias=False, dtype=torch.bfloat16)
    loss = linear_cross_entropy(h, head, torch.randint(50, (40,)), list(head.parameters()))
    loss.backward()
    assert loss.dtype == torch.float32 and h.grad.dtype == torch.bfloat16 and head.weight.grad.dtype == torch.bfloat16


def test_without_gradients_an_adapted_head_gets_none():
    h, head, labels = _case(20, 4, 7, 0.3, torch.float32)
    asked = []
    head.register_full_backward_hook(lambda *_: asked.append(1))
    with torch.no_grad():
        linear_cross_entropy(h, head, labels, list(head.parameters()))
    assert not asked


# The kernel rounds the gradient to the logits' dtype; Triton's interpreter chops bfloat16 instead.
@pytest.mark.interpreter
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (3, 7), (5, 64), (4, 203)])
def test_kernel(close, monkeypatch, rows, vocab, dtype, tolerance):
    monkeypatch.setattr(room, "COLUMNS", 64)  # several turns a row, the last one ragged
    whole = torch.full((rows + 2, vocab), 5.0, dtype=dtype)
    logits, labels = whole[1:-1], torch.randint(vocab, (rows,))
    logits.copy_(5 * torch.randn(rows, vocab))
    exact = logits.double().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(exact, labels, reduction="sum")
    loss, grad = room._loss_and_gradient(logits, labels)
    assert grad.data_ptr() == logits.data_ptr() and loss.dtype == torch.float32
    close(loss, wanted, 1e-6)
    close(grad, torch.autograd.grad(wanted, exact)[0], tolerance)
    assert (whole[[0, -1]] == 5).all()  # the rows beside it


@pytest.mark.interpreter
def test_kernel_with_logits_of_any_size():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [80.0, 90.0, 100.0]])
    exact, labels = logits.double().requires_grad_(), torch.tensor([0, 2, 0])
    wanted = torch.nn.functional.cross_entropy(exact, labels, reduction="sum")
    loss, grad = room._loss_and_gradient(logits, labels)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), torch.autograd.grad(wanted, exact)[0], rtol=1e-5, atol=1e-7)


@pytest.mark.interpreter
@pytest.mark.parametrize("chunk_bytes", [1, 2**26])
def test_kernel_equals_whole_logits_with_an_adapted_head(close, lora, chunk_bytes):
    h = torch.randn(40, 64, requires_grad=True)
    linear, labels = Linear(lora.frozen(101, 64), lora.update(101, 64, 4)), torch.randint(101, (40,))
    labels[::3] = IGNORED
    loss = linear_cross_entropy(h, lambda rows: lora_linear(rows, linear), labels, linear.tensors[:2], chunk_bytes)
    inputs = [h, *linear.tensors[:2]]
    found = loss, *torch.autograd.grad(loss, inputs)
    exact, exact_h = lora.doubled(linear, torch.float32), h.detach().double().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(lora_reference(exact_h, exact), labels, reduction="sum")
    for value, want in zip(found, (wanted, *torch.autograd.grad(wanted, [exact_h, *exact.tensors[:2]])), strict=True):
        close(value, want, 2e-5)
