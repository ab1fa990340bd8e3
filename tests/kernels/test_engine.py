"""The engine with kernels (in Triton's interpreter) against the engine without: loss and every gradient, in float32."""

import sys
from importlib import import_module

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from effitrain.adapters.attach import adapters, attach
from effitrain.adapters.base import AdapterConfig, Clock
from effitrain.adapters.lora import LoRA
from effitrain.core.keep import KeepMap, LayerKeep
from effitrain.core.placement import place
from effitrain.kernels import backend
from effitrain.kernels.linear_cross_entropy import IGNORED, linear_cross_entropy
from effitrain.model.decoder import build
from effitrain.model.load import fill, find_base, load_model, stream
from effitrain.planning import recipe
from effitrain.pruning.cut import CutWeights
from effitrain.stream.fresh import FreshLayers
from effitrain.train.trainable import make_trainable

pytestmark = pytest.mark.interpreter
CPU = torch.device("cpu")
LENGTHS = (3, 9, 1)
# Some two hundred float32 roundings in another order; the largest gradient of a tensor is the scale.
TOLERANCE = 1e-4


def _decoder(folder, quant, targets):
    asked = recipe(model=str(folder), quant=quant, dtype="fp32")
    decoder = load_model(find_base(str(folder)), asked, CPU)
    for adapter in attach(decoder, AdapterConfig(r=4, alpha=8, targets=targets), Clock(0)).values():
        left, right = adapter.factors()
        adapter.load_factors(torch.randn(left.shape), right)
    return decoder


def _inputs(decoder):
    """Hidden states, head, labels and what the head has that is trained."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 200, (sum(LENGTHS),), generator=generator)
    labels = ids.roll(-1)
    labels[::4] = IGNORED
    hidden = decoder(ids, torch.cat([torch.arange(n) for n in LENGTHS]), LENGTHS)
    return hidden, decoder.lm_head, labels, [p for p in decoder.lm_head.parameters() if p.requires_grad]


def _loss_and_gradients(decoder):
    trained = [p for p in decoder.parameters() if p.requires_grad]
    loss = linear_cross_entropy(*_inputs(decoder))
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


IN_FULL = {"train_norms": True, "train_embeddings": True}
SHIFTED = {"attention": "s2", "s2_group": 4}


@pytest.mark.parametrize(
    ("family", "quant", "fields"),
    [
        ("qwen2", "none", {"method": "full"}),
        ("qwen3", "nf4", {"method": "lisa", "lisa_layers": 1, "lisa_train_embeddings": False}),
        ("llama", "nf4", {"method": "lisa-delta", "lisa_layers": 1, "lora_r": 4}),
        ("llama", "nf4", {"lora_r": 4, **IN_FULL}),
        ("qwen3", "none", {"lora_r": 4, **IN_FULL}),
        ("llama", "nf4", {"lora_r": 4, **SHIFTED}),
        ("qwen3", "nf4", {"lora_r": 4, **SHIFTED}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value,
)
def test_whatever_is_trained(tiny_model, close, monkeypatch, family, quant, fields):
    """The gradient of every parameter, with the layer that LISA trains beside one that it does not."""
    folder = str(tiny_model(family, layers=1 + fields.get("lisa_layers", 0)))
    asked, base = recipe(model=folder, quant=quant, dtype="fp32", **fields), find_base(folder)
    decoder = load_model(base, asked, CPU).train()
    made = make_trainable(decoder, asked, Clock(0), base.weights)
    for adapter in made.adapters.values():
        left, right = adapter.factors()
        adapter.load_factors(torch.randn(left.shape), right)
    found = _loss_and_stored_gradients(decoder)
    monkeypatch.setattr(backend, "INTERPRETED", False)
    wanted = _loss_and_stored_gradients(decoder)
    assert wanted.keys() == found.keys() and len(wanted) > len(made.parameters) > 0
    for name, value in wanted.items():
        close(found[name], value, TOLERANCE)


def _loss_and_stored_gradients(decoder):
    """By name, as a step finds them: a trained table adds to its own gradient."""
    loss = linear_cross_entropy(*_inputs(decoder))
    loss.backward()
    found = {name: p.grad for name, p in decoder.named_parameters() if p.requires_grad}
    decoder.zero_grad(set_to_none=True)
    return {"loss": loss.detach()} | {name: grad.to_dense() for name, grad in found.items()}


def test_in_tiles(tiny_model, close, monkeypatch):
    decoder = _decoder(tiny_model("llama", layers=1), "nf4", ALL)
    decoder.set_recompute("layer")
    decoder.set_tile(5)
    found = _loss_and_gradients(decoder)
    decoder.set_tile(None)
    monkeypatch.setattr(backend, "INTERPRETED", False)
    for value, wanted in zip(found, _loss_and_gradients(decoder), strict=True):
        close(value, wanted, TOLERANCE)


def test_widths_as_pruning_leaves_them(tiny_model, close, monkeypatch):
    """No multiple of anything: three heads of 12, each with its own keys, 53 channels."""
    decoder = _decoder(tiny_model("llama", layers=1, hidden=36, heads=3, kv_heads=3, ffn=53), "nf4", None)
    found = _loss_and_gradients(decoder)
    monkeypatch.setattr(backend, "INTERPRETED", False)
    for value, wanted in zip(found, _loss_and_gradients(decoder), strict=True):
        close(value, wanted, TOLERANCE)


def test_a_pruned_model(tiny_model, close, monkeypatch):
    """Cut by a keep map into layers of different widths, one of them with half the query and key heads."""
    base = find_base(str(tiny_model("llama", layers=2, hidden=64, heads=8, kv_heads=2, ffn=128)))
    kept = [LayerKeep(tuple(range(128)), (0, 1)), LayerKeep(tuple(range(3, 99)), (1,))]
    keep = KeepMap.of(base.spec, kept, "full", "print")
    spec, weights = base.spec.resized(keep.widths), CutWeights(base.fetched().weights(), base.spec, keep)
    decoder = fill(build(spec, base.source.config, "small"), weights, "nf4", torch.float32, CPU)
    for adapter in attach(decoder, AdapterConfig(r=4, alpha=8), Clock(0)).values():
        left, right = adapter.factors()
        adapter.load_factors(torch.randn(left.shape), right)
    found = _loss_and_gradients(decoder)
    assert {p.shape for p in decoder.layers[1].parameters()} != {p.shape for p in decoder.layers[0].parameters()}
    monkeypatch.setattr(backend, "INTERPRETED", False)
    for value, wanted in zip(found, _loss_and_gradients(decoder), strict=True):
        close(value, wanted, TOLERANCE)


KERNELS = [
    "nf4_dequantize",
    "nf4_linear",
    "lora_linear",
    "lora_qkv",
    "lora_mlp",
    "rms_norm",
    "rope",
    "swiglu",
    "dropout",
]


@pytest.mark.parametrize("kernel", [*KERNELS, "linear_cross_entropy"])
def test_without_one_kernel(tiny_model, close, monkeypatch, kernel):
    """What the doctor switches off is replaced alone, also inside the functions that are made of several."""
    decoder = _decoder(tiny_model("llama", layers=1), "nf4", ALL)
    wanted = _loss_and_gradients(decoder)
    monkeypatch.setenv("EFFITRAIN_KERNELS_OFF", kernel)
    room = import_module(f"effitrain.kernels.{kernel}")
    for name in [
        name for name, value in vars(room).items() if isinstance(value, InterpretedFunction) and name[0] == "_"
    ]:
        if vars(room)[name].fn.__module__ == room.__name__:
            monkeypatch.setattr(room, name, None)  # whoever launches it fails
    for value, want in zip(_loss_and_gradients(decoder), wanted, strict=True):
        close(value, want, TOLERANCE)


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
    assert asked >= {*KERNELS} - {"dropout"}  # none is asked for


def _streamed(folder, slots):
    """One resident and two streamed layers, with LoRA on all linears."""
    base = find_base(str(folder))
    decoder = build(base.spec, base.source.config, "trial")
    placement = place(3, 1, slots)
    fill(decoder, base.weights(), "nf4", torch.float32, CPU, streamed=placement.streamed)
    stream(decoder, FreshLayers(base.spec, base.weights(), "nf4", "fp32"), placement, CPU)
    attach(decoder, AdapterConfig(r=4, alpha=8), Clock(0))
    decoder.set_recompute("layer")
    return decoder


@pytest.mark.parametrize("slots", [1, 2])
def test_streamed_layers(tiny_model, close, monkeypatch, slots):
    """Slots are written anew between forward and backward: the kernels must read the layer that is there by then."""
    decoder = _streamed(tiny_model("llama", layers=3), slots)
    torch.manual_seed(0)
    for parameter in decoder.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn(parameter.shape))
    found = _loss_and_gradients(decoder)
    monkeypatch.setattr(backend, "INTERPRETED", False)
    for value, wanted in zip(found, _loss_and_gradients(decoder), strict=True):
        close(value, wanted, TOLERANCE)


def test_recomputation_drops_what_was_dropped(tiny_model, close):
    decoder = _decoder(tiny_model("llama", layers=1), "nf4", None)
    for adapter in adapters(decoder).values():
        adapter.dropout = 0.4
    results = []
    for what in ("none", "layer"):
        decoder.set_recompute(what)
        results.append(_loss_and_gradients(decoder))
    for value, wanted in zip(*results, strict=True):
        close(value, wanted, 1e-6)
    for adapter in adapters(decoder).values():
        adapter.dropout = 0.0
    assert not torch.allclose(_loss_and_gradients(decoder)[0], results[0][0])


def test_an_adapter_of_another_form_goes_its_own_way(tiny_model, close, monkeypatch):
    decoder = _decoder(tiny_model("llama", layers=1), "nf4", None)
    wanted = _loss_and_gradients(decoder)
    monkeypatch.setattr(LoRA, "low_rank", lambda self: None)
    for value, want in zip(_loss_and_gradients(decoder), wanted, strict=True):
        close(value, want, TOLERANCE)
