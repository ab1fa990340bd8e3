"""The token embedding: frozen, or a table that is trained, whole or in the rows that batches have.

Shapes: V vocabulary, H hidden size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RowTable(nn.Parameter):
    """A trained table [V, H] in float32 whose gradient is sparse: the rows that were looked up, each once."""


class Embedding(nn.Module):
    """Token embedding, gathered where its weight lives and handed to the device of the layers."""

    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.scale = scale
        self.weight: Tensor | None = None
        self.device = torch.device("cpu")
        self.dtype: torch.dtype | None = None  # of what is handed on; None for that of the weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """Rows of the table for ``input_ids`` [...]: [..., H]."""
        assert self.weight is not None
        ids = input_ids.to(self.weight.device)
        rows = (_LookUp.apply if self.weight.requires_grad else F.embedding)(ids, self.weight)
        rows = rows.to(self.dtype or rows.dtype)
        if self.scale != 1.0:  # Gemma rounds the factor to the table's dtype first
            rows = rows * torch.tensor(self.scale, dtype=rows.dtype)
        return rows.to(self.device, non_blocking=True)

    def train_table(self, table: nn.Parameter) -> None:
        """Look up in ``table`` [V, H], float32, from now on; what is handed on keeps its dtype."""
        assert self.weight is not None
        self.dtype, self.weight = self.weight.dtype, table

    def train_rows(self) -> None:
        """Make the weight a ``RowTable`` in host memory, a copy: a tied head keeps the weights it has."""
        assert self.weight is not None
        self.train_table(RowTable(self.weight.detach().to("cpu", torch.float32, copy=True)))


class _LookUp(torch.autograd.Function):
    """Rows of a table. Backward adds to the table's gradient itself: no second [V, H] is made, nor kept for a tied
    head; a sparse one has each row once, so never more rows than the table; and batches are added in the order of their
    backward passes.
    """

    @staticmethod
    def forward(ctx: Any, ids: Tensor, table: Tensor) -> Tensor:
        ctx.ids, ctx.table = ids, table
        return F.embedding(ids, table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        table = ctx.table
        if not isinstance(table, RowTable):
            table.grad = torch.zeros_like(table) if table.grad is None else table.grad
            table.grad.index_put_((ctx.ids.flatten(),), grad.flatten(0, -2), accumulate=True)
            return None, None
        rows, place = ctx.ids.flatten().unique(return_inverse=True)
        values = grad.new_zeros(len(rows), table.shape[1]).index_add_(0, place, grad.flatten(0, -2))
        more = torch.sparse_coo_tensor(rows[None], values, table.shape, is_coalesced=True, check_invariants=False)
        table.grad = more if table.grad is None else (table.grad + more).coalesce()
        return None, None
