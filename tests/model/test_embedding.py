"""The trained table: its sparse gradient against the dense one, over several batches."""

import pytest
import torch
from torch.nn import functional as F

from effitrain.model.embedding import Embedding, RowTable


@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sparse_gradient_is_the_dense_one(dtype, scale):
    embedding, table = Embedding(scale), torch.randn(11, 6).to(dtype)
    embedding.weight = table
    frozen = [embedding(torch.tensor([3, 1, 3])), embedding(torch.tensor([7, 3]))]
    embedding.train_rows()
    dense = table.float().requires_grad_()
    for ids, before in zip((torch.tensor([3, 1, 3]), torch.tensor([7, 3])), frozen, strict=True):
        out = embedding(ids)
        assert out.dtype == dtype and torch.equal(out, before)
        weight = torch.randn_like(out)
        (out * weight).sum().backward()
        ((F.embedding(ids, dense).to(dtype) * torch.tensor(scale, dtype=dtype)) * weight).sum().backward()
    grad = embedding.weight.grad
    assert isinstance(embedding.weight, RowTable) and grad.is_coalesced()
    assert grad._indices()[0].tolist() == [1, 3, 7]  # each row once
    assert torch.equal(grad.to_dense(), dense.grad)


def test_the_table_is_a_copy_so_that_a_tied_head_stays():
    embedding, table = Embedding(), torch.randn(5, 4)
    embedding.weight = table
    embedding.train_rows()
    with torch.no_grad():
        embedding.weight.zero_()
    assert table.any()
