"""Recovery: kept slices hold what was trained, zeros elsewhere; gradients as in a masked full model; stock peft."""

import json

import pytest
import torch

from effitrain.adapters.attach import attach
from effitrain.adapters.base import AdapterConfig, Clock
from effitrain.adapters.storage import AdapterBundle, load_into, read_adapter, save_adapter
from effitrain.adapters.variants import kinds
from effitrain.core.errors import InputError
from effitrain.io.keep import KEEP
from effitrain.io.run_folder import positions_of_small
from effitrain.model.load import fill
from effitrain.pruning.cut import CutWeights
from effitrain.pruning.recover import recover_adapter, recover_factors
from effitrain.train.loss import loss_sum

from .conftest import CPU, mask, stock_logits

CONFIG = AdapterConfig(r=3, alpha=5)


@pytest.fixture(params=[("llama", 8, 2, 64), ("llama", 6, 2, 48), ("qwen3", 8, 4, 64)], ids=str)
def full(model, request):
    family, heads, kv_heads, hidden = request.param
    return model(family, heads=heads, kv_heads=kv_heads, hidden=hidden, layers=3)


def small_decoder(full, keep):
    weights = CutWeights(full.weights, full.spec, keep)
    return fill(full.empty(full.spec.resized(keep.widths)), weights, "none", torch.float32, CPU)


def random_values(adapters):
    with torch.no_grad():
        for adapter in adapters.values():
            for parameter in adapter.parameters():
                parameter.normal_(std=0.1)
    return adapters


def bundle_of(adapters, config=CONFIG):
    return AdapterBundle(config, "small", {path: adapter.factors() for path, adapter in adapters.items()})


@pytest.mark.parametrize("kind", kinds())
def test_the_update_stands_in_the_kept_slices_alone(full, uneven, kind):
    keep = uneven(full.spec)
    config = AdapterConfig(kind, 3, 5)
    bundle = bundle_of(random_values(attach(small_decoder(full, keep), config, Clock(1))), config)
    factors = recover_factors(bundle, keep, full.spec)
    for layer in full.spec.layers:
        for linear in layer.linears:
            path = f"model.layers.{layer.index}.{linear.name}"
            rows = keep.indices(layer.index, linear.out_axis) or list(range(linear.out_features))
            columns = keep.indices(layer.index, linear.in_axis) or list(range(linear.in_features))
            (B, A), (small_B, small_A) = factors[path], bundle.tensors[path]
            assert (len(B), A.shape[1]) == (linear.out_features, linear.in_features)
            assert torch.equal(B[rows], small_B) and torch.equal(A[:, columns], small_A)  # pruned again: bit for bit
            assert B.count_nonzero() == small_B.count_nonzero() and A.count_nonzero() == small_A.count_nonzero()


def test_gradients_equal_those_of_the_masked_full_model(full, uneven, text):
    """float32, other summation orders: 1e-4 of the largest gradient."""
    keep = uneven(full.spec)
    small = small_decoder(full, keep)
    adapters = random_values(attach(small, CONFIG, Clock(1)))
    (batch,) = text(1)
    loss_sum(small, batch).backward()

    masked = mask(full.stock(), keep).state_dict()

    class Masked(type(full.weights)):
        def read(self, name, device="cpu"):
            return masked[name]

    whole = fill(full.empty(), Masked(**vars(full.weights)), "none", torch.float32, CPU)
    on_full = attach(whole, CONFIG, Clock(1))
    factors = recover_factors(bundle_of(adapters), keep, full.spec)
    load_into(on_full, AdapterBundle(CONFIG, "full", factors), "recovered")
    # The update of a dropped up or o row is zero, and so is its frozen weight: the two models compute the same.
    with torch.no_grad():
        for layer in full.spec.layers:
            for linear in layer.linears:
                path = f"model.layers.{layer.index}.{linear.name}"
                assert torch.equal(on_full[path].B, factors[path][0])
    loss_sum(whole, batch).backward()
    for layer in full.spec.layers:
        for linear in layer.linears:
            path = f"model.layers.{layer.index}.{linear.name}"
            rows = keep.indices(layer.index, linear.out_axis) or list(range(linear.out_features))
            columns = keep.indices(layer.index, linear.in_axis) or list(range(linear.in_features))
            for mine, theirs in (
                (adapters[path].B.grad, on_full[path].B.grad[rows]),
                (adapters[path].A.grad, on_full[path].A.grad[:, columns]),
            ):
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * max(mine.abs().max().item(), 1e-3))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks by the old name
def test_written_for_stock_peft_with_the_bases_fingerprint(full, uneven, text, tmp_path):
    from peft import PeftModel

    base = full.base.fetched()
    keep = uneven(full.spec, fingerprint=base.weights().fingerprint())
    adapters = random_values(attach(small_decoder(full, keep), CONFIG, Clock(1)))
    save_adapter(tmp_path / "small", bundle_of(adapters).tensors, CONFIG, "small")
    bundle = recover_adapter(tmp_path / "small", keep, base, tmp_path / "full")
    noted = json.loads((tmp_path / "full/base.json").read_text())
    assert noted == {"name": base.name, "fingerprint": base.weights().fingerprint()}
    assert read_adapter(tmp_path / "full").base_model == base.name
    (batch,) = text(1)
    ours = fill(full.empty(), full.weights, "none", torch.float32, CPU)
    load_into(attach(ours, bundle.config, Clock()), bundle, "recovered")
    with torch.no_grad():
        logits = ours.eval().logits(ours(batch.input_ids, batch.position_ids, batch.segments))
    theirs = stock_logits(PeftModel.from_pretrained(full.stock(), tmp_path / "full"), batch)
    torch.testing.assert_close(logits, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def test_a_wrong_base_is_refused(model, uneven, tmp_path):
    right, wrong = model(layers=3), model(layers=3, tied=True)
    keep = uneven(right.spec, fingerprint=right.weights.fingerprint())
    with pytest.raises(InputError, match="other weights than the model that was pruned"):
        recover_adapter(tmp_path, keep, wrong.base.fetched(), tmp_path / "full")
    with pytest.raises(InputError, match="belongs to another model"):
        recover_adapter(tmp_path, keep, model(layers=2).base.fetched(), tmp_path / "full")
    assert not (tmp_path / "full").exists()


def test_an_adapter_that_is_not_of_the_small_model_is_refused(model, uneven):
    full = model(layers=3)
    keep = uneven(full.spec)
    whole = fill(full.empty(), full.weights, "none", torch.float32, CPU)
    with pytest.raises(InputError, match="trained on another model"):
        recover_factors(bundle_of(attach(whole, CONFIG, Clock())), keep, full.spec)


def test_positions_of_an_adapter_are_those_of_its_run_then_of_the_small_model(tmp_path):
    """A run that prunes gives the full-size model its positions, whatever the small model that it was lent has."""
    lent, alone, pruning = (tmp_path / name for name in ("small", "alone", "pruning"))
    for folder, files in ((lent, ["config.json"]), (alone / "adapter", []), (pruning / "adapter-small", [])):
        folder.mkdir(parents=True)
        for name in [*files, "adapter_config.json"]:
            (folder / name).write_text('{"of": "small"}')
    (lent / KEEP).touch()
    (pruning / KEEP).touch()
    for run in (alone, pruning):
        (run / "run.json").touch()
    for keep in (lent, lent / KEEP):
        for adapter in (alone, alone / "adapter"):
            assert positions_of_small(str(adapter), str(keep)) == {"of": "small"}
        assert positions_of_small(str(pruning / "adapter-small"), str(keep)) is None
    for run, adapter in ((alone, "adapter"), (pruning, "adapter-small")):
        (run / "config.json").write_text('{"of": "run"}')
        assert positions_of_small(str(run / adapter), str(lent)) == {"of": "run"}
