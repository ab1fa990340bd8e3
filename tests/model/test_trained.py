"""Trained weights against a plain loop over stock transformers; masters keep what bf16 would lose."""

import pytest
import torch

from effitrain.data.batches import MicroBatch
from effitrain.model.decoder import Decoder
from effitrain.model.load import find_base, load_model
from effitrain.model.trained import train_all
from effitrain.planning import recipe
from effitrain.train.loss import loss_sum

CPU = torch.device("cpu")
FAMILIES = [("llama", False), ("llama", True), ("qwen2", False), ("qwen3", True), ("gemma", True)]


def full_decoder(folder, dtype="fp32", recompute="none") -> Decoder:
    asked = recipe(model=str(folder), method="full", dtype=dtype)
    decoder = load_model(find_base(str(folder)), asked, CPU)
    decoder.set_recompute(recompute)
    train_all(decoder)
    return decoder


def batch(vocab=200, lengths=(7, 33, 1, 12), seed=0) -> tuple[MicroBatch, list[torch.Tensor]]:
    """Samples of odd lengths end to end, the first token of each masked; and the samples."""
    source = torch.Generator().manual_seed(seed)
    samples = [torch.randint(3, vocab, (n,), generator=source) for n in lengths]
    labels = torch.cat([torch.cat([s[1:], torch.tensor([-100])]) for s in samples])
    places = torch.cat([torch.arange(n) for n in lengths])
    return MicroBatch(
        torch.cat(samples), labels, places, lengths, (labels != -100).nonzero().flatten(), len(lengths)
    ), samples


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("recompute", ["none", "mlp", "layer"])
@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_loss_and_every_gradient_are_those_of_stock_transformers(tiny_model, family, tied, recompute):
    from transformers import AutoModelForCausalLM

    folder = tiny_model(family, tied)
    decoder, stock = full_decoder(folder, recompute=recompute), AutoModelForCausalLM.from_pretrained(folder).double()
    micro, samples = batch()
    loss = loss_sum(decoder, micro)
    loss.backward()
    theirs = sum(
        torch.nn.functional.cross_entropy(stock(s[None]).logits[0, :-1], s[1:], reduction="sum")
        for s in samples
        if len(s) > 1
    )
    theirs.backward()
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    ours, wanted = dict(decoder.named_parameters()), dict(stock.named_parameters())
    assert ours.keys() == wanted.keys() and all(p.dtype == torch.float32 for p in ours.values())
    for name, parameter in ours.items():
        scale = wanted[name].grad.abs().max().item()  # float32 sums against float64 ones
        torch.testing.assert_close(parameter.grad.double(), wanted[name].grad, rtol=1e-4, atol=1e-5 * scale, msg=name)


def test_a_master_keeps_updates_that_bf16_would_lose(tiny_model):
    decoder = full_decoder(tiny_model("llama"), dtype="bf16")
    parameters = dict(decoder.named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-6, weight_decay=0.0)
    for seed in range(4):
        loss_sum(decoder, batch(seed=seed)[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
    name = "model.layers.1.mlp.down_proj.weight"
    master, start = parameters[name], before[name]
    moved = (master != start).float().mean().item()
    lost = (master.to(torch.bfloat16) == start.to(torch.bfloat16)).float().mean().item()
    assert moved > 0.95 and lost > 0.9


def test_hidden_states_keep_the_compute_dtype(tiny_model):
    decoder = full_decoder(tiny_model("qwen3"), dtype="bf16")
    micro, _ = batch()
    assert decoder(micro.input_ids, micro.position_ids, micro.segments).dtype == torch.bfloat16
