"""Micro-batches that pass each layer together leave the gradients of those that go one by one, bit for bit."""

import pytest
import torch

from effitrain.adapters.attach import attach
from effitrain.adapters.base import AdapterConfig, Clock
from effitrain.adapters.full import train_in_full
from effitrain.data.batches import MicroBatch
from effitrain.model.load import find_base, load_model
from effitrain.model.trained import train_tables
from effitrain.planning import recipe
from effitrain.train.loss import backward_in_groups

CPU = torch.device("cpu")


def micro_batches(lengths=((5, 9), (12,), (3, 1, 7), (8,), (11, 2))) -> list[MicroBatch]:
    """Of odd lengths, with tokens that several of them hold."""
    made, source = [], torch.Generator().manual_seed(3)
    for samples in lengths:
        ids = torch.randint(3, 40, (sum(samples),), generator=source)
        places = torch.cat([torch.arange(n) for n in samples])
        labels = torch.where(places == 2, -100, ids.roll(-1))
        made.append(MicroBatch(ids, labels, places, samples, (labels != -100).nonzero().flatten(), len(samples)))
    return made


def gradients(folder, what: str, at_once: int) -> dict[str, torch.Tensor]:
    decoder = load_model(find_base(str(folder)), recipe(model=str(folder), quant="none", dtype="fp32"), CPU)
    decoder.set_recompute("layer")
    torch.manual_seed(0)
    for adapter in attach(decoder, AdapterConfig(r=3), Clock()).values():
        left, right = adapter.factors()
        adapter.load_factors(torch.randn(left.shape), right)
    if what == "tables":
        train_tables(decoder)
    else:
        train_in_full(decoder, norms=True, embeddings=True)
    backward_in_groups(decoder, micro_batches(), lambda number: None, at_once)
    return {name: p.grad.to_dense() for name, p in decoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("at_once", [2, 3, 5])
@pytest.mark.parametrize(("what", "tied"), [("tables", False), ("rows", False), ("rows", True)])
def test_gradients_are_added_in_the_order_of_one_by_one(tiny_model, what, tied, at_once):
    folder = tiny_model("llama", tied)
    wanted, found = gradients(folder, what, 1), gradients(folder, what, at_once)
    assert wanted.keys() == found.keys() and {"model.embed_tokens.weight", "model.norm.weight"} <= wanted.keys()
    assert not [name for name in wanted if not torch.equal(found[name], wanted[name])]
