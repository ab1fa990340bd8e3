"""Output projection and cross-entropy in one pass over chunks of rows, so that no [tokens, vocab] tensor is ever alive.

Formula, for row t with target c:  loss_t = logsumexp(z_t) - z_t[c],  z_t = head(h_t);  dz_t = softmax(z_t) - onehot(c).

Shapes: hidden [T, H], labels [T]; a chunk holds [rows, V] logits in float32, and its gradient takes their place.
Masked rows (label -100) never reach the head. Saved for backward: the gradient of ``hidden`` [T, H] and those of the
head's own parameters, all computed in the forward pass while a chunk's logits are at hand (one pass over the head
instead of two). The head may be any module: frozen, trainable or adapted.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from effitrain.kernels.backend import tl, triton, usable

IGNORED = -100
COLUMNS = 4096  # of a row that a program holds at once
CHUNK_BYTES = 64 * 2**20  # of float32 logits alive; smaller chunks read the head's weight more often
Head = Callable[[Tensor], Tensor]


def reference(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    """The same sum of losses from whole logits."""
    return F.cross_entropy(head(hidden).float(), labels, ignore_index=IGNORED, reduction="sum")


def linear_cross_entropy(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    parameters: Sequence[Tensor] = (),
    chunk_bytes: int = CHUNK_BYTES,
    rows: Tensor | None = None,
) -> Tensor:
    """Sum over the rows with a label of the cross-entropy of ``head(hidden)``, a float32 scalar.

    Args:
        hidden: final hidden states [T, H].
        head: maps [rows, H] to logits [rows, V].
        labels: target ids [T]; -100 marks rows without a target.
        parameters: the head's trainable tensors, which get gradients.
        chunk_bytes: upper bound of a chunk's float32 logits, in bytes.
        rows: indices of the rows with a target, where the caller knows them: to ask a device is to wait for it.
    """
    if not torch.is_grad_enabled():
        hidden, parameters = hidden.detach(), ()
    rows = (labels != IGNORED).nonzero().flatten() if rows is None else rows
    return _LinearCrossEntropy.apply(hidden, head, labels, rows, chunk_bytes, *parameters)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Head, labels: Tensor, rows: Tensor, chunk_bytes: int, *parameters: Tensor
    ) -> Tensor:
        wanted = [ctx.needs_input_grad[0], *ctx.needs_input_grad[5:]]
        sources = [hidden, *parameters]
        grads = [torch.zeros_like(s) if w else None for s, w in zip(sources, wanted, strict=True)]
        total = hidden.new_zeros((), dtype=torch.float32)
        chunk, step = 0, 16  # sixteen rows tell the width of the logits, hence how many rows a chunk may have
        targets, kept = labels[rows].to(hidden.device), rows.to(hidden.device)
        while chunk < len(kept):
            part = kept[chunk : chunk + step]
            with torch.enable_grad():
                h = hidden.detach()[part].requires_grad_(wanted[0])
                logits = head(h)
            loss, dlogits = _loss_and_gradient(logits.detach(), targets[chunk : chunk + step])
            total += loss
            if any(wanted):
                _accumulate(grads, part, logits, dlogits, [h, *parameters])
            chunk, step = chunk + step, max(16, chunk_bytes // (4 * logits.shape[-1]))
            del h, logits, dlogits  # or they live while the next chunk's are made
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        hidden, *parameters = (None if g is None else g * scale.to(g.dtype) for g in ctx.saved_tensors)
        return hidden, None, None, None, None, *parameters


@triton.jit
def _softmax(z_ptr, label_ptr, loss_ptr, V, COLS: tl.constexpr):
    """Loss of one row, whose logits become their gradient; read twice, written once, nothing in between."""
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * V
    label = tl.load(label_ptr + row)
    picked = tl.load(z_ptr + label).to(tl.float32)  # before the reductions, at which all warps meet, and the stores
    top, norm = float("-inf"), 0.0
    for start in range(0, V, COLS):
        col = start + tl.arange(0, COLS)
        z = tl.load(z_ptr + col, mask=col < V, other=float("-inf")).to(tl.float32)
        above = tl.maximum(top, tl.max(z, 0))
        norm = norm * tl.exp(top - above) + tl.sum(tl.exp(z - above), 0)
        top = above
    tl.store(loss_ptr + row, tl.log(norm) + top - picked)
    for start in range(0, V, COLS):
        col = start + tl.arange(0, COLS)
        z = tl.load(z_ptr + col, mask=col < V, other=float("-inf")).to(tl.float32)
        grad = tl.exp(z - top) / norm - tl.where(col == label, 1.0, 0.0)
        tl.store(z_ptr + col, grad.to(z_ptr.dtype.element_ty), mask=col < V)


def _loss_and_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of losses and d(loss)/d(logits), which takes the place of ``logits``."""
    if logits.is_contiguous() and usable("linear_cross_entropy", logits):
        losses = torch.empty(len(labels), dtype=torch.float32, device=logits.device)
        _softmax[(len(labels),)](logits, labels, losses, logits.shape[1], COLS=COLUMNS, num_warps=8)
        return losses.sum(), logits
    z = logits.float()
    z -= z.amax(-1, keepdim=True)
    picked = z.gather(-1, labels[:, None])
    z.exp_()
    norm = z.sum(-1, keepdim=True)
    loss = (norm.log() - picked).sum()
    z /= norm
    z.scatter_add_(-1, labels[:, None], z.new_full((len(labels), 1), -1.0))
    return loss, logits.copy_(z)


def _accumulate(
    grads: list[Tensor | None], rows: Tensor, logits: Tensor, dlogits: Tensor, inputs: Sequence[Tensor]
) -> None:
    """Add one chunk's gradients: into ``rows`` of the first, the hidden states, and into the whole of the others."""
    asked = [i for i, g in enumerate(grads) if g is not None]
    for i, grad in zip(asked, torch.autograd.grad(logits, [inputs[i] for i in asked], dlogits), strict=True):
        target = grads[i]
        assert target is not None
        if i == 0:
            target[rows] = grad
        else:
            target += grad
