"""Norms and MLPs in tiles of tokens: the same outputs and gradients as all tokens at once, to rounding."""

import pytest
import torch

from effitrain.adapters.attach import attach
from effitrain.adapters.base import AdapterConfig, Clock
from effitrain.model.load import find_base, load_model
from effitrain.model.tiles import in_tiles
from effitrain.planning import recipe
from effitrain.quant.linear import FrozenLinear
from effitrain.stream.offload import Offload

CPU = torch.device("cpu")
LENGTHS = (9, 17, 5)
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma")
CLOSE = 1e-5  # of the largest value: some hundred float32 roundings in another order


def decoder_of(folder, quant="nf4", targets=None):
    asked = recipe(model=str(folder), quant=quant, dtype="fp32")
    decoder = load_model(find_base(str(folder)), asked, CPU)
    for adapter in attach(decoder, AdapterConfig(r=4, alpha=8, targets=targets), Clock(0)).values():
        left, right = adapter.factors()
        adapter.load_factors(torch.randn(left.shape), right)
    decoder.set_recompute("layer")
    return decoder


def step(decoder):
    """Hidden states, and the gradients of a random sum of them."""
    ids = torch.randint(3, 200, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    hidden = decoder(ids, torch.cat([torch.arange(n) for n in LENGTHS]), LENGTHS)
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    trained = [p for p in decoder.parameters() if p.requires_grad]
    return [hidden, *torch.autograd.grad((hidden * weights).sum(), trained)]


def check(found, wanted):
    assert len(found) == len(wanted)
    for value, right in zip(found, wanted, strict=True):
        assert right.any()
        assert (value - right).abs().max() <= CLOSE * right.abs().max()


@pytest.mark.parametrize("tile", [1, 8, 30, 31, 100])
def test_every_size_of_tile(tiny_model, tile):
    decoder = decoder_of(tiny_model("llama"))
    wanted = step(decoder)
    decoder.set_tile(tile)
    check(step(decoder), wanted)
    decoder.set_tile(None)
    assert all(map(torch.equal, step(decoder), wanted))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", [None, ("q_proj",), ("down_proj",)])
def test_every_family_trained_norms_included(tiny_model, family, targets):
    decoder = decoder_of(tiny_model(family), "none", targets)
    for norm in (decoder.layers[0].input_layernorm, decoder.layers[1].post_attention_layernorm, decoder.model.norm):
        norm.weight.requires_grad_(True)
    wanted = step(decoder)
    decoder.set_tile(7)
    check(step(decoder), wanted)
    decoder.offload = Offload(len(decoder.layers), sum(LENGTHS), decoder.spec.hidden, torch.float32, CPU)
    check(step(decoder), wanted)


def test_no_names_change(tiny_model):
    decoder = decoder_of(tiny_model("llama"))
    names = [list(dict(named())) for named in (decoder.named_parameters, decoder.named_modules)]
    decoder.set_tile(7)
    assert [list(dict(named())) for named in (decoder.named_parameters, decoder.named_modules)] == names


@torch.no_grad()
def test_evaluation(tiny_model):
    decoder = decoder_of(tiny_model("llama")).eval()
    ids = torch.randint(3, 200, (31,))
    wanted = decoder(ids, torch.arange(31), [31])
    decoder.set_tile(8)
    check([decoder(ids, torch.arange(31), [31])], [wanted])


def test_no_value_is_computed_that_nobody_reads(tiny_model, monkeypatch):
    """The product of each tile is made once: neither the layer's second pass nor the tile's reads it."""
    decoder, made = decoder_of(tiny_model("llama")), []
    product = FrozenLinear.product

    def counted(linear, x):
        made.extend([linear.spec.name] * linear.value_needed)
        return product(linear, x)

    monkeypatch.setattr(FrozenLinear, "product", counted)
    decoder.set_tile(8)
    step(decoder)
    layers, tiles = len(decoder.layers), 4
    assert made.count("mlp.down_proj") == layers * tiles
    assert made.count("mlp.gate_proj") == made.count("mlp.up_proj") == 2 * layers * tiles
    assert made.count("self_attn.o_proj") == 2 * layers


def test_no_block_sees_more_than_a_tile():
    weight, seen = torch.randn(6, 6, dtype=torch.float64, requires_grad=True), []

    def block(x):
        seen.append(len(x))
        return (x @ weight).tanh()

    x = torch.randn(2, 11, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: in_tiles(block, x, [w], 5), (x, weight))
    assert set(seen) == {2, 5} and len(seen) % 5 == 0  # 22 rows in five tiles
