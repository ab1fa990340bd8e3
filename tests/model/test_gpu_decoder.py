"""A model on the card against the same model on the CPU: where its tensors live, its logits, its gradients."""

import pytest
import torch

from effitrain.evals.generate import generate
from effitrain.io.nf4 import NF4Tensor
from effitrain.model.load import find_base, load_model
from effitrain.planning import recipe
from effitrain.quant.linear import FrozenLinear
from effitrain.train.memory import model_tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LENGTHS = (9, 30, 1, 14)


def _load(folder, device, quant="none", dtype="fp32"):
    asked = recipe(model=str(folder), quant=quant, dtype=dtype)
    return load_model(find_base(str(folder)), asked, device).eval()


def _row():
    ids = torch.randint(3, 200, (sum(LENGTHS),))
    return ids, torch.cat([torch.arange(n) for n in LENGTHS]), LENGTHS


@pytest.mark.parametrize("quant", ["none", "nf4"])
@pytest.mark.parametrize("tied", [False, True])
def test_where_the_tensors_live(tiny_model, tied, quant):
    decoder = _load(tiny_model("llama", tied), CUDA, quant)
    table = decoder.model.embed_tokens.weight
    assert table.is_cuda == tied
    on_host = {t.data_ptr() for t in model_tensors(decoder) if not t.is_cuda}
    assert on_host == (set() if tied else {table.data_ptr()})
    kinds = {type(m.weight) for n, m in decoder.named_modules() if isinstance(m, FrozenLinear) and n != "lm_head"}
    assert kinds == {NF4Tensor if quant == "nf4" else torch.Tensor}
    assert decoder.device.type == "cuda" and decoder.lm_head.weight.is_cuda


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_logits_of_the_cpu(tiny_model, family, tied):
    here, there = (_load(tiny_model(family, tied), device) for device in (CPU, CUDA))
    row = _row()
    wanted, found = here.logits(here(*row)), there.logits(there(*row))
    assert found.is_cuda and (found.cpu() - wanted).abs().max() < 1e-4 * wanted.abs().max()


@torch.no_grad()
def test_bf16_nf4_follows_fp32(tiny_model):
    """NF4 is stored alike, so what differs is bf16: 8 bits, through some forty roundings."""
    here, there = _load(tiny_model("llama"), CPU, "nf4"), _load(tiny_model("llama"), CUDA, "nf4", "bf16")
    row = _row()
    wanted, found = here.logits(here(*row)), there.logits(there(*row))
    assert found.dtype == torch.bfloat16
    assert (found.float().cpu() - wanted).abs().max() < 0.1 * wanted.abs().max()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@torch.no_grad()
def test_perturbing_one_sample_leaves_the_others_bit_identical(tiny_model, dtype):
    decoder = _load(tiny_model("llama"), CUDA, "nf4", dtype)
    ids, positions, lengths = _row()
    samples = ids.split(lengths)
    before = decoder(ids, positions, lengths).split(lengths)
    for k in range(len(lengths)):
        changed = torch.cat([s.flip(0) + 1 if i == k else s for i, s in enumerate(samples)])
        after = decoder(changed, positions, lengths).split(lengths)
        assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [i != k for i in range(len(lengths))]


@pytest.mark.parametrize("tied", [False, True])
def test_generates_what_the_cpu_generates(tiny_model, tied):
    prompt = torch.randint(3, 200, (12,)).tolist()
    here, there = (list(generate(_load(tiny_model("qwen3", tied), d), prompt, 20, set())) for d in (CPU, CUDA))
    assert here == there and len(here) == 20
