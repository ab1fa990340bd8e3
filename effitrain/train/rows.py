"""AdamW for tables of which a step sees few rows: only those change, and only rows once seen have moments.

Each row's moments and bias correction are those of AdamW over the steps that saw it, so a row seen in every step moves
as under AdamW. Shapes: V rows of H numbers, R rows of a gradient, K rows seen so far.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from effitrain.model.embedding import RowTable


@torch.no_grad()
def step_rows(optimizer: Optimizer, args: Any = (), kwargs: Any = None) -> None:
    """Before a step of ``optimizer``: take its tables' steps and their gradients away from it."""
    for group in optimizer.param_groups:
        for table in group["params"]:
            if isinstance(table, RowTable) and table.grad is not None:
                _adamw(table, table.grad.coalesce(), optimizer.state[table], group)
                table.grad = None


def blank_gradient(parameter: Tensor) -> Tensor:
    """Zeros in the largest gradient that ``parameter`` can get: of a table, one that has all rows."""
    if not isinstance(parameter, RowTable):
        return torch.zeros_like(parameter)
    rows = torch.arange(len(parameter), device=parameter.device)[None]
    return torch.sparse_coo_tensor(
        rows, torch.zeros_like(parameter), parameter.shape, is_coalesced=True, check_invariants=False
    )


def _adamw(table: Tensor, grad: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> None:
    rows, values = grad._indices()[0], grad._values()
    at = _slots(table, rows, state)
    (beta1, beta2), lr = group["betas"], group["lr"]
    state["step"][at] += 1
    steps = state["step"][at][:, None]
    first = state["exp_avg"][at].lerp_(values, 1 - beta1)
    second = state["exp_avg_sq"][at].mul_(beta2).addcmul_(values, values, value=1 - beta2)
    state["exp_avg"][at], state["exp_avg_sq"][at] = first, second
    down = second.div_(1 - beta2**steps).sqrt_().add_(group["eps"])
    update = first.div_(1 - beta1**steps).div_(down)
    table[rows] = table[rows].mul_(1 - lr * group["weight_decay"]).sub_(update, alpha=lr)


def _slots(table: Tensor, rows: Tensor, state: dict[str, Any]) -> Tensor:
    """Where the moments of ``rows`` are, int64 [R]; rows seen for the first time get theirs, zeros."""
    if not state:
        state["slots"] = torch.full((len(table),), -1, device=table.device)
        state["step"] = table.new_zeros(0)
        state["exp_avg"], state["exp_avg_sq"] = (table.new_zeros(0, table.shape[1]) for _ in range(2))
    slots = state["slots"] = state["slots"].long()  # torch makes floats of them when a state is loaded
    fresh = rows[slots[rows] < 0]
    if len(fresh):
        slots[fresh] = torch.arange(len(state["step"]), len(state["step"]) + len(fresh), device=slots.device)
        for name in ("step", "exp_avg", "exp_avg_sq"):
            old = state[name]
            state[name] = torch.cat([old, old.new_zeros(len(fresh), *old.shape[1:])])
    return slots[rows]
