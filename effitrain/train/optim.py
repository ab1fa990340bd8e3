"""Optimizers by name: torch's AdamW and bitsandbytes' 8-bit forms."""

from collections.abc import Iterable

import torch
from torch import Tensor


def make_optimizer(name: str, parameters: Iterable[Tensor], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """``adamw`` (float32 states), ``adamw8bit`` or ``paged-adamw8bit`` (states spill to host memory on CUDA)."""
    parameters = list(parameters)
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)
    import bitsandbytes as bnb

    paged = name == "paged-adamw8bit" and parameters[0].is_cuda  # managed memory needs a card
    kind = bnb.optim.PagedAdamW8bit if paged else bnb.optim.AdamW8bit
    return kind(parameters, lr=lr, weight_decay=weight_decay)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
