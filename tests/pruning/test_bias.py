"""FLAP's bias: what dropped channels gave on average, against plain sums over a stock model; what it brings back."""

import numpy as np
import pytest
import torch

from effitrain.core.spec import Axis
from effitrain.data.batches import Batches
from effitrain.data.tokenized import TokenSet
from effitrain.model.load import fill, find_base
from effitrain.pruning.bias import Biases
from effitrain.pruning.cut import CutWeights, write_cut

from .conftest import CPU


@pytest.mark.parametrize("shape", [("llama", 6, 2, 48), ("qwen3", 8, 4, 64)], ids=str)
def test_biases_are_the_means_of_what_is_lost(model, text, uneven, inputs_of, shape):
    family, heads, kv_heads, hidden = shape
    full = model(family, heads=heads, kv_heads=kv_heads, hidden=hidden, layers=3)
    keep, batches = uneven(full.spec, seed=2), text(3)
    biases = Biases(full.walk(), keep, batches)
    stock = full.stock()
    inputs, expected, errors = inputs_of(stock, batches), {}, {}
    for layer in full.spec.layers:
        for linear in layer.linears:
            kept = keep.indices(layer.index, linear.in_axis)
            if linear.out_axis == Axis.MODEL and kept is not None:
                path = f"model.layers.{layer.index}.{linear.name}"
                gone = [i for i in range(linear.in_features) if i not in set(kept)]
                lost = inputs[path][:, gone].double() @ stock.get_submodule(path).weight.detach().double()[:, gone].t()
                expected[path] = lost.mean(0)
                errors[path] = (lost.square().sum(), (lost - lost.mean(0)).square().sum())
    assert list(biases.means) == list(expected) == biases.paths
    for path, mean in expected.items():
        torch.testing.assert_close(biases.means[path], mean.float(), rtol=1e-4, atol=1e-5 * mean.abs().max().item())
    for fit, (before, after) in zip(biases.fits, errors.values(), strict=True):
        assert fit.after < fit.before
        assert fit.after / fit.before == pytest.approx((after / before).item(), rel=1e-4)


def test_on_text_without_any_variety_the_small_model_is_the_full_one(model, uneven, tmp_path):
    """One token, over and over, each for itself: what is lost is the same every time, and the bias gives it back. From
    its folder, so that the loader has to give the linears their biases. Tolerance: float32 sums in another order.
    """
    full = model("llama", heads=6, kv_heads=2, hidden=48, layers=3)
    keep = uneven(full.spec, seed=2)
    ids = np.full(20, 65, dtype=np.int32)
    batches = [Batches(TokenSet(ids, ids.copy(), np.arange(21)), 20, 8, False, 0).get(0)]
    cut = CutWeights(full.weights, full.spec, keep)
    biases = Biases(full.walk(), keep, batches)
    with_bias = CutWeights(full.weights, full.spec, keep, biases, biases.paths)
    write_cut(tmp_path / "small", with_bias, full.base.source.config, full.folder)
    small = find_base(str(tmp_path / "small")).fetched()
    assert small.spec.layers == with_bias.small_spec.layers
    decoders = [
        fill(full.empty(spec), weights, "none", torch.float32, CPU)
        for spec, weights in ((full.spec, full.weights), (cut.small_spec, cut), (small.spec, small.weights()))
    ]
    with torch.no_grad():
        whole, plain, compensated = (d(b.input_ids, b.position_ids, b.segments) for d in decoders for b in batches)
    torch.testing.assert_close(compensated, whole, rtol=1e-4, atol=1e-4)
    assert (plain - whole).abs().max() > 0.1
    assert all(fit.after < 1e-6 < fit.before for fit in biases.fits)


def test_a_bias_that_is_there_is_added_to(model, text, uneven):
    """Qwen2 has biases on q, k, v alone; here its o_proj is told to have one."""
    full = model("qwen2", heads=6, kv_heads=3, hidden=48)
    keep = uneven(full.spec)
    biases = Biases(full.walk(), keep, text(2))
    path = biases.paths[0]
    had = torch.randn(48)
    assert torch.equal(biases(f"{path}.bias", had), had + biases.means[path])
    assert torch.equal(biases(f"{path}.weight", had), had)
