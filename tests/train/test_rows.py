"""AdamW on the rows that a step sees: against torch's on dense tables, and what stays as it was."""

import logging

import pytest
import torch
from torch.nn import functional as F

from effitrain.model.embedding import Embedding
from effitrain.train.loop import clip
from effitrain.train.memory import StorageTracker
from effitrain.train.optim import gradients, make_optimizer, scale
from effitrain.train.rows import blank_gradient

logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)


def trained(rows=9, width=4):
    embedding = Embedding()
    embedding.weight = torch.randn(rows, width)
    embedding.train_rows()
    return embedding


def step(embedding, optimizer, ids, target):
    (embedding(torch.tensor(ids)) - target).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_a_row_moves_as_under_adamw_over_the_steps_that_saw_it(name, decay):
    """float32, another order of the same operations."""
    embedding, dense = trained(), {}
    beside = torch.nn.Parameter(torch.ones(3))
    optimizer = make_optimizer(name, [beside, embedding.weight], 1e-2, decay)
    start = embedding.weight.detach().clone()
    seen = [[0, 1], [1, 1, 2], [0, 2], [1], [2, 5, 0]]
    for ids in seen:
        beside.grad = torch.ones(3)
        step(embedding, optimizer, ids, 1.0)
    for row in (0, 1, 2, 5):
        alone = torch.nn.Parameter(start[row].clone())
        other = torch.optim.AdamW([alone], lr=1e-2, weight_decay=decay)
        for ids in seen:
            if row in ids:
                (ids.count(row) * (alone - 1).square().sum()).backward()
                other.step()
                other.zero_grad()
        dense[row] = alone.detach()
    for row, wanted in dense.items():
        torch.testing.assert_close(embedding.weight[row].detach(), wanted, rtol=1e-5, atol=1e-6)
    unseen = [3, 4, 6, 7, 8]
    assert torch.equal(embedding.weight[unseen], start[unseen]) and not torch.equal(beside, torch.ones(3))
    assert optimizer.state[embedding.weight]["exp_avg"].shape == (4, 4)  # moments of seen rows alone


def test_it_goes_on_from_a_saved_state_bit_for_bit():
    embedding = trained()
    optimizer = make_optimizer("adamw", [embedding.weight], 1e-2, 0.0)
    for ids in ([0, 3], [3, 4]):
        step(embedding, optimizer, ids, 0.5)
    state = optimizer.state_dict()
    again = Embedding()
    again.weight = embedding.weight.detach().clone()
    again.train_rows()
    other = make_optimizer("adamw", [again.weight], 1e-2, 0.0)
    other.load_state_dict({**other.state_dict(), "state": {n: dict(s) for n, s in state["state"].items()}})
    for ids in ([4, 1], [0, 3, 8]):
        step(embedding, optimizer, ids, 0.5)
        step(again, other, ids, 0.5)
    assert torch.equal(embedding.weight, again.weight)


@pytest.mark.parametrize("most", [0.0, 0.1, 1e6])
def test_clipping_takes_rows_and_the_rest_together(most):
    embedding, beside = trained(), torch.nn.Parameter(torch.ones(3))
    dense = embedding.weight.detach().clone().requires_grad_()
    twin = torch.nn.Parameter(torch.ones(3))
    ids = torch.tensor([2, 2, 7])
    (embedding(ids).square().sum() + beside.square().sum()).backward()
    (F.embedding(ids, dense).square().sum() + twin.square().sum()).backward()
    for pair in ([embedding.weight, beside], [dense, twin]):
        scale(gradients(pair), 0.5)
    norm = clip([embedding.weight, beside], most, 0)
    wanted = torch.nn.utils.clip_grad_norm_([dense, twin], most or float("inf"))
    assert norm == pytest.approx(wanted.item(), rel=1e-6)
    torch.testing.assert_close(embedding.weight.grad.to_dense(), dense.grad)
    torch.testing.assert_close(beside.grad, twin.grad)


def test_the_largest_gradient_has_every_row_and_is_counted():
    table = trained(rows=100, width=8).weight
    grad = blank_gradient(table)
    assert grad.is_sparse and grad._nnz() == 100 and not grad.to_dense().any()
    tracker = StorageTracker()
    tracker.add([grad])
    assert tracker.live == 100 * 8 * 4 + 100 * 8
    assert torch.equal(blank_gradient(torch.nn.Parameter(torch.ones(2))), torch.zeros(2))
