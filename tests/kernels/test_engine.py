"""The engine with kernels (in Triton's interpreter) against the engine without: loss and every gradient, in float32."""

import sys

import pytest
import torch

from effitrain.adapters.attach import attach
from effitrain.adapters.base import AdapterConfig, Clock
from effitrain.kernels import backend
from effitrain.kernels.linear_cross_entropy import IGNORED, linear_cross_entropy
from effitrain.model.load import find_base, load_model
from effitrain.planning import recipe

pytestmark = pytest.mark.interpreter
LENGTHS = (3, 9, 1)
# Some two hundred float32 roundings in another order; the largest gradient of a tensor is the scale.
TOLERANCE = 1e-4


def _decoder(folder, quant, targets):
    asked = recipe(model=str(folder), quant=quant, dtype="fp32")
    decoder = load_model(find_base(str(folder)), asked, torch.device("cpu"))
    for adapter in attach(decoder, AdapterConfig(r=4, alpha=8, targets=targets), Clock(0)).values():
        left, right = adapter.factors()
        adapter.load_factors(torch.randn(left.shape), right)
    return decoder


def _loss_and_gradients(decoder):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 200, (sum(LENGTHS),), generator=generator)
    labels = ids.roll(-1)
    labels[::4] = IGNORED
    hidden = decoder(ids, torch.cat([torch.arange(n) for n in LENGTHS]), LENGTHS)
    trained = [p for p in decoder.parameters() if p.requires_grad]
    head = [p for p in decoder.lm_head.parameters() if p.requires_grad]
    loss = linear_cross_entropy(hidden, decoder.lm_head, labels, head)
    return loss, *torch.autograd.grad(loss, trained)


ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


@pytest.mark.parametrize(
    ("family", "quant", "what", "targets"),
    [
        ("llama", "nf4", "none", ALL),
        ("llama", "nf4", "layer", ALL),
        ("qwen3", "nf4", "mlp", None),
        ("qwen2", "none", "none", ("q_proj", "down_proj")),
        ("gemma", "nf4", "none", None),
        ("mistral", "none", "layer", None),
    ],
)
def test_loss_and_gradients(tiny_model, close, monkeypatch, family, quant, what, targets):
    decoder = _decoder(tiny_model(family, layers=1), quant, targets)
    decoder.set_recompute(what)
    found = _loss_and_gradients(decoder)
    monkeypatch.setattr(backend, "INTERPRETED", False)
    for value, wanted in zip(found, _loss_and_gradients(decoder), strict=True):
        close(value, wanted, TOLERANCE)


def test_every_kernel_takes_part(tiny_model, monkeypatch):
    asked, usable = set(), backend.usable
    decoder = _decoder(tiny_model("qwen3", layers=1), "nf4", ALL)

    def spy(kernel, *tensors):
        result = usable(kernel, *tensors)
        asked.update({kernel} if result else ())
        return result

    for name, module in list(sys.modules.items()):
        if name.startswith("effitrain.") and getattr(module, "usable", None) is usable:
            monkeypatch.setattr(module, "usable", spy)
    _loss_and_gradients(decoder)
    assert asked >= {
        "nf4_dequantize",
        "nf4_linear",
        "lora_linear",
        "lora_qkv",
        "lora_mlp",
        "rms_norm",
        "rope",
        "swiglu",
    }
