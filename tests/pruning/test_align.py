"""Alignment by least squares: the closed form, and what it does to hidden states."""

import numpy as np
import pytest
import torch

from effitrain.core.spec import Axis
from effitrain.model.load import fill
from effitrain.model.walk import Walk
from effitrain.pruning.align import Aligner, LeastSquares
from effitrain.pruning.cut import CutWeights

from .conftest import CPU


def test_the_closed_form_is_that_of_numpy():
    """Gathered from batches; ridge as extra rows of the problem."""
    g = torch.Generator().manual_seed(0)
    a, r = torch.randn(40, 7, generator=g), torch.randn(40, 5, generator=g)
    problem = LeastSquares(5, 7, CPU)
    for part in (slice(0, 13), slice(13, 40)):
        problem.add(a[part], r[part], 2 * r[part])
    change, before, after = problem.solve(0.1)
    damping = (0.1 * (a.double().square().sum(0).mean())).sqrt()
    rows = np.concatenate([a.double().numpy(), damping.item() * np.eye(7)])
    wanted = np.linalg.lstsq(rows, np.concatenate([r.double().numpy(), np.zeros((7, 5))]), rcond=None)[0].T
    torch.testing.assert_close(change, torch.tensor(wanted).float())
    left = r - a @ change.t()
    assert before == pytest.approx(0.25) and after == pytest.approx(
        left.square().sum().item() / (4 * r.square().sum().item())
    )


def test_inputs_that_are_all_zero_change_nothing():
    problem = LeastSquares(2, 3, CPU)
    problem.add(torch.zeros(4, 3), torch.ones(4, 2), torch.ones(4, 2))
    change, before, after = problem.solve(0.1)
    assert not change.any() and before == after == 1.0


@pytest.mark.parametrize("shape", [("llama", 6, 2, 48), ("qwen3", 8, 4, 64)], ids=str)
def test_hidden_states_follow_the_full_model_more_closely(model, text, uneven, shape):
    family, heads, kv_heads, hidden = shape
    full = model(family, heads=heads, kv_heads=kv_heads, hidden=hidden, layers=3)
    keep = uneven(full.spec, seed=2)
    cut = CutWeights(full.weights, full.spec, keep)
    spec, batches = full.spec.resized(keep.widths), text(8)
    aligner = Aligner(full.walk(), Walk(full.empty(spec), cut, "none", torch.float32, CPU), keep, batches)
    decoders = [
        fill(full.empty(shape), weights, "none", torch.float32, CPU)
        for shape, weights in ((full.spec, full.weights), (spec, cut),
                               (spec, CutWeights(full.weights, full.spec, keep, aligner)))
    ]  # fmt: skip
    with torch.no_grad():
        whole, plain, aligned = (
            torch.cat([d(b.input_ids, b.position_ids, b.segments) for b in batches]) for d in decoders
        )
    assert (aligned - whole).norm() < 0.8 * (plain - whole).norm()
    sides = ((Axis.HEADS, "self_attn.o_proj"), (Axis.FFN, "mlp.down_proj"))
    lost = [(i, name) for i in range(3) for axis, name in sides if keep.indices(i, axis) is not None]
    assert [(fit.layer, fit.linear) for fit in aligner.fits] == lost and lost
    assert all(fit.after < fit.before for fit in aligner.fits)


def test_only_what_lost_columns_changes(model, text, uneven):
    full = model("llama", heads=6, kv_heads=2, hidden=48, layers=3)
    keep = uneven(full.spec)
    cut = CutWeights(full.weights, full.spec, keep)
    small = Walk(full.empty(full.spec.resized(keep.widths)), cut, "none", torch.float32, CPU)
    aligned = CutWeights(full.weights, full.spec, keep, Aligner(full.walk(), small, keep, text(4)))
    changed = [name for name in cut.names() if not torch.equal(cut.read(name), aligned.read(name))]
    assert changed == [
        f"model.layers.{layer.index}.{linear.name}.weight"
        for layer in full.spec.layers
        for linear in layer.linears
        if linear.out_axis == Axis.MODEL and keep.indices(layer.index, linear.in_axis) is not None
    ]
