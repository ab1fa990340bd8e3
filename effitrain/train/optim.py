"""Optimizers by name: torch's AdamW and bitsandbytes' 8-bit forms."""

from collections.abc import Iterable

import torch
from torch import Tensor

from effitrain.train.rows import step_rows


def make_optimizer(name: str, parameters: Iterable[Tensor], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """``adamw`` (float32 states), ``adamw8bit`` or ``paged-adamw8bit`` (states spill to host memory on CUDA).

    A ``RowTable`` among the parameters gets the steps of ``step_rows`` under each of them.
    """
    optimizer = _make(name, list(parameters), lr, weight_decay)
    optimizer.register_step_pre_hook(step_rows)
    return optimizer


def _make(name: str, parameters: list[Tensor], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)
    import bitsandbytes as bnb

    paged = name == "paged-adamw8bit" and any(p.is_cuda for p in parameters)  # it needs a card
    kind = bnb.optim.PagedAdamW8bit if paged else bnb.optim.AdamW8bit
    return kind(parameters, lr=lr, weight_decay=weight_decay)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The gradients that are there, to be changed in place; of a table those of its rows."""
    grads = [p.grad for p in parameters if p.grad is not None]
    return [grad._values() if grad.is_sparse else grad for grad in grads]


def scale(grads: Iterable[Tensor], factor: Tensor | float) -> None:
    """Multiply ``grads``, wherever they are, by a number."""
    grads = list(grads)
    for device in {grad.device for grad in grads}:
        here = factor.to(device) if isinstance(factor, Tensor) else factor
        torch._foreach_mul_([grad for grad in grads if grad.device == device], here)
