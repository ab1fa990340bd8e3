"""The contract that every adapter variant must keep: those of the folder, the example of the docs, and the ones that
EFFITRAIN_ADAPTERS names.
"""

import pytest
import torch

from effitrain.adapters.attach import AdaptedLinear
from effitrain.adapters.base import AdapterConfig, Clock, recover
from effitrain.adapters.storage import load_into, read_adapter, save_adapter
from effitrain.adapters.variants import adapter_class, kinds, own_kinds
from effitrain.core.errors import InputError
from effitrain.core.spec import Axis, LinearSpec
from effitrain.kernels.lora_linear import Linear, reference
from effitrain.quant.linear import FrozenLinear
from effitrain.quant.nf4 import quantize

OUT, IN, NAME = 24, 64, "model.layers.0.mlp.up_proj"
CONFIGS = [AdapterConfig(r=4, alpha=6), AdapterConfig(r=5, alpha=3, rslora=True)]


def _linear(quantised=True):
    linear = FrozenLinear(LinearSpec("mlp.up_proj", Axis.FFN, Axis.MODEL, OUT, IN, False))
    weight = torch.randn(OUT, IN)
    linear.weight = quantize(weight) if quantised else weight
    return linear


def _adapter(kind, config, linear, clock=None):
    return adapter_class(kind).build(linear, config, NAME, clock or Clock(7), torch.device("cpu"))


def _train_a_little(adapter, dtype=torch.float32):
    """Random trained-looking values in every tensor."""
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return adapter.to(dtype)


@pytest.fixture(params=[*kinds(), *own_kinds(), "the example"])
def kind(request):
    if request.param == "the example":
        request.getfixturevalue("own_folder")
        return "gated"
    return request.param


@pytest.fixture(params=CONFIGS, ids=["plain", "rslora"])
def config(request):
    return request.param


def test_starts_at_zero_and_every_tensor_can_learn(kind, config):
    linear = _linear()
    adapter = _adapter(kind, config, linear)
    x = torch.randn(3, IN)
    assert torch.equal(adapter(x, linear.matmul(x)), linear.matmul(x))
    assert not adapter.delta_weight().any()
    assert all(p.dtype == torch.float32 for p in adapter.parameters())
    gradient_seen = set()
    for _ in range(2):  # B of LoRA learns in the first step, A in the second
        out = adapter(x, linear.matmul(x)).square().sum()
        for name, parameter in adapter.named_parameters():
            (grad,) = torch.autograd.grad(out, parameter, retain_graph=True)
            gradient_seen |= {name} if grad.any() else set()
        _train_a_little(adapter)
    assert gradient_seen == {name for name, p in adapter.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("lead", [(7,), (1, 7), (2, 3)])
def test_forward_is_the_merged_weight_in_float64(kind, config, lead):
    linear = _linear(quantised=False)
    linear.weight = linear.weight.double()
    adapter = _train_a_little(_adapter(kind, config, linear), torch.float64)
    x = torch.randn(*lead, IN, dtype=torch.float64)
    merged = linear.weight + adapter.delta_weight().double()
    torch.testing.assert_close(adapter(x, linear.matmul(x)), x @ merged.T, rtol=1e-10, atol=1e-10)
    left, right = adapter.factors()
    torch.testing.assert_close(adapter.delta_weight(), config.scaling * (left @ right))


def test_the_fused_kernels_get_the_same_update(kind, config):
    linear = _linear(quantised=False)
    linear.weight = linear.weight.double()
    adapter = _train_a_little(_adapter(kind, config, linear), torch.float64)
    update = adapter.low_rank()
    if update is None:
        pytest.skip(f"{kind} is no low-rank update of this form")
    x = torch.randn(3, IN, dtype=torch.float64)
    torch.testing.assert_close(reference(x, Linear(linear, update)), adapter(x, linear.matmul(x)))


def test_gradients_in_float64(kind, config):
    linear = _linear(quantised=False)
    linear.weight = linear.weight.double()
    adapter = _train_a_little(_adapter(kind, config, linear), torch.float64)
    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    tensors = [p for p in adapter.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(lambda x, *_: adapter(x, linear.matmul(x)), (x, *tensors))


def test_adapters_never_touch_the_weight(kind, config):
    """Quantised, streamed or pruned: an adapter meets ``matmul`` and ``weight_slice`` only."""

    class View:
        in_features, out_features = IN, OUT
        _linear = _linear()

        def matmul(self, x):
            return self._linear.matmul(x)

        def weight_slice(self, rows, columns, dtype=torch.float32):
            return self._linear.weight_slice(rows, columns, dtype)

        def __getattr__(self, name):
            raise AssertionError(f"the adapter read .{name} of its linear")

    view = View()
    adapter = _adapter(kind, config, view)
    x = torch.randn(2, IN)
    adapter(x, view.matmul(x))
    adapter.factors()


def test_saved_and_loaded_bit_for_bit(kind, config, tmp_path):
    adapter = _train_a_little(_adapter(kind, config, _linear()))
    save_adapter(tmp_path / "a", {NAME: adapter.factors()}, config, "base")
    bundle = read_adapter(tmp_path / "a")
    fresh = _adapter("lora", config, _linear())
    load_into({NAME: fresh}, bundle, "a")
    assert torch.equal(fresh.delta_weight(), adapter.delta_weight())
    assert (bundle.config.r, bundle.config.scaling, bundle.base_model) == (config.r, config.scaling, "base")


def test_recovery_scatters_along_named_axes(kind, config):
    adapter = _train_a_little(_adapter(kind, config, _linear()))
    kept_out, kept_in = torch.arange(0, 2 * OUT, 2), torch.arange(1, 2 * IN, 2)
    kept, sizes = {"out": kept_out, "in": kept_in}, {"out": 2 * OUT, "in": 2 * IN}
    tensors = dict(adapter.named_parameters())
    assert set(adapter.axes) == set(tensors) | {name for name, _ in adapter.named_buffers()}
    full = {name: recover(t.detach(), adapter.axes[name], kept, sizes) for name, t in tensors.items()}
    for name, tensor in tensors.items():
        assert tensor.dim() == len(adapter.axes[name])
        index = [kept.get(axis, torch.arange(n)) for axis, n in zip(adapter.axes[name], tensor.shape, strict=True)]
        assert torch.equal(full[name][torch.meshgrid(*index, indexing="ij")], tensor)
        assert full[name].count_nonzero() == tensor.count_nonzero()


def test_random_start_and_dropout_depend_on_the_key_alone(kind):
    config = AdapterConfig(r=4, dropout=0.5)
    first, again = _adapter(kind, config, _linear(), Clock(7)), _adapter(kind, config, _linear(), Clock(7))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    clock = Clock(7, step=3)
    adapter = _train_a_little(_adapter(kind, config, _linear(), clock))
    x, y = torch.randn(1, 9, IN), torch.randn(1, 9, OUT)
    outputs = []
    for clock.step, clock.micro_batch in ((3, 0), (3, 0), (3, 1), (4, 0)):
        torch.rand(5)  # the global generator has no say
        outputs.append(adapter.train()(x, y.clone()))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], outputs[3])
    assert torch.equal(adapter.eval()(x, y.clone()), y + (x @ adapter.delta_weight().T)) or torch.allclose(
        adapter(x, y.clone()), y + x @ adapter.delta_weight().T, atol=1e-4
    )


def test_bf16_compute_with_float32_tensors(kind, config):
    linear = _linear()
    module = AdaptedLinear(linear, _train_a_little(_adapter(kind, config, linear)))
    x = torch.randn(1, 5, IN, dtype=torch.bfloat16, requires_grad=True)
    y = module(x)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16 and all(p.grad.dtype == torch.float32 for p in module.parameters())


def test_an_unknown_kind_names_the_known_ones():
    with pytest.raises(InputError, match="lora"):
        adapter_class("lroa")
