"""Weights of the model itself that are trained: float32 masters, rounded to the compute dtype wherever they are used.

An update of Adam at a rate of 1e-5 is smaller than half a step of bf16 at most weights, so bf16 alone would lose it.
A master takes the place of the weight, so what it costs beside gradient and states is 4 bytes. Shapes: x [..., in].
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effitrain.model.decoder import Decoder, Embedding
from effitrain.model.load import frozen_linears
from effitrain.quant.linear import FrozenLinear


class TrainedLinear(nn.Module):
    """``y = x W^T + b`` with trained ``W`` [out, in] and ``b`` [out], float32, rounded to the dtype of ``x``.

    ``base``: the frozen linear whose place it takes; where ``bias`` is None its own is added.
    """

    def __init__(self, base: FrozenLinear, weight: nn.Parameter, bias: nn.Parameter | None = None):
        super().__init__()
        self.base, self.weight, self.bias = base, weight, bias

    def as_linear(self) -> None:
        """The kernels for a whole block take frozen weights."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]; keeps ``x`` for backward, and no rounded weight."""
        bias = self.base.bias if self.bias is None else self.bias
        return _TrainedMatmul.apply(x, self.weight, bias, self.base)


class _TrainedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, base: FrozenLinear) -> Tensor:
        ctx.save_for_backward(x, weight)
        if not base.value_needed:  # computed again for backward, where nobody reads it
            return x.new_zeros(*x.shape[:-1], len(weight))
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wanted_x, wanted_weight, wanted_bias = ctx.needs_input_grad[:3]
        dx = grad @ weight.to(grad.dtype) if wanted_x else None
        rows = grad.reshape(-1, grad.shape[-1])
        dweight = (rows.t() @ x.reshape(-1, x.shape[-1])).to(weight.dtype) if wanted_weight else None
        dbias = rows.sum(0, dtype=weight.dtype) if wanted_bias else None
        return dx, dweight, dbias, None


def layer_weights(layer: nn.Module) -> dict[str, Tensor]:
    """Every weight of a frozen layer by its path in it: matrices (those in NF4 left out), biases and norms."""
    found: dict[str, Tensor] = {}
    for linear in frozen_linears(layer):
        for kind, tensor in (("weight", linear.weight), ("bias", linear.bias)):
            if isinstance(tensor, Tensor):
                found[f"{linear.spec.name}.{kind}"] = tensor
    return {**found, **{name: parameter.detach() for name, parameter in layer.named_parameters()}}


def train_layer(layer: nn.Module, masters: Mapping[str, nn.Parameter], keep_frozen: bool = False) -> None:
    """Have ``layer`` compute with ``masters``, by path; its frozen weights are let go, or kept for later."""
    for linear in frozen_linears(layer):
        name = linear.spec.name
        weight, bias = masters[f"{name}.weight"], masters.get(f"{name}.bias")
        layer.set_submodule(name, TrainedLinear(linear, weight, bias))
        if not keep_frozen:
            linear.weight = linear.bias = None
    for path, parameter in masters.items():
        if not _of_linear(path):
            _set_parameter(layer, path, parameter)


def freeze_layer(layer: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put the frozen linears back into their places, with ``weights``, by path, in the place of masters; a matrix that
    is missing is left out.
    """
    for name, trained in [(n, m) for n, m in layer.named_modules() if isinstance(m, TrainedLinear)]:
        trained.base.weight, trained.base.bias = weights.get(f"{name}.weight"), weights.get(f"{name}.bias")
        layer.set_submodule(name, trained.base)
    for path, weight in weights.items():
        if not _of_linear(path):
            _set_parameter(layer, path, nn.Parameter(weight, requires_grad=False))


def _of_linear(path: str) -> bool:
    """Whether a weight belongs to a linear, and not to a norm."""
    return path.rpartition(".")[0].endswith("_proj")


def _set_parameter(layer: nn.Module, path: str, parameter: nn.Parameter) -> None:
    module, _, leaf = path.rpartition(".")
    setattr(layer.get_submodule(module), leaf, parameter)


def train_tables(decoder: Decoder) -> None:
    """Train the embedding, the head (tied to it or not) and the last norm, all on the device."""
    embedding, head, norm = decoder.model.embed_tokens, decoder.lm_head, decoder.model.norm
    assert isinstance(embedding, Embedding) and isinstance(head, FrozenLinear)
    assert embedding.weight is not None and isinstance(head.weight, Tensor) and isinstance(norm, nn.Module)
    table = master(embedding.weight.to(decoder.device))
    embedding.train_table(table)
    decoder.lm_head = TrainedLinear(head, table if decoder.spec.tied else master(head.weight))
    head.weight = None
    norm.weight = master(norm.weight)  # type: ignore[arg-type]


def train_all(decoder: Decoder) -> None:
    """Train every weight; layer by layer, so that no more than one is there twice."""
    for layer in decoder.layers:
        train_layer(layer, {path: master(weight) for path, weight in layer_weights(layer).items()})
    train_tables(decoder)


def master(weight: Tensor) -> nn.Parameter:
    """A float32 parameter that starts at ``weight``; it takes over the memory of a weight in float32."""
    return nn.Parameter(weight.detach().float())
