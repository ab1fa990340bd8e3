"""Put adapters on a model's linears, find them again, and take one linear apart."""

from collections.abc import Iterator

from torch import Tensor, nn

from effitrain.adapters.base import Adapter, AdapterConfig, Clock
from effitrain.adapters.variants import adapter_class
from effitrain.core.errors import InputError
from effitrain.kernels.backend import usable
from effitrain.kernels.lora_linear import Linear, lora_linear
from effitrain.model.decoder import Decoder
from effitrain.quant.linear import FrozenLinear


class AdaptedLinear(nn.Module):
    """A frozen linear and the adapter on it."""

    def __init__(self, base: FrozenLinear, adapter: Adapter):
        super().__init__()
        self.base, self.adapter = base, adapter

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        linear = self.as_linear() if usable("lora_linear", x) else None
        if linear is not None:
            return lora_linear(x, linear)
        return self.adapter(x, self.base.matmul(x))

    def as_linear(self) -> Linear | None:
        """Base and update as the fused kernels take them; None when the adapter has a form of its own."""
        update = self.adapter.low_rank()
        return None if update is None else Linear(self.base, update)


def attach(decoder: Decoder, config: AdapterConfig, clock: Clock) -> dict[str, Adapter]:
    """Put an adapter on every linear that ``config.targets`` names; by default all linears of the decoder layers.

    Returns:
        The adapters by module path, such as ``model.layers.0.self_attn.q_proj``.

    Raises:
        InputError: a target matches no linear; names those there are.
    """
    linears = {name: module for name, module in decoder.named_modules() if isinstance(module, FrozenLinear)}
    kind = adapter_class(config.kind)
    for name in target_names(list(linears), config.targets):
        base = linears[name]
        adapter = kind.build(base, config, name, clock, decoder.device)
        decoder.set_submodule(name, AdaptedLinear(base, adapter))
    return adapters(decoder)


def target_names(names: list[str], targets: tuple[str, ...] | None) -> list[str]:
    """The module paths that ``targets`` pick: a target is the path's last part or any longer end of it.

    Raises:
        InputError: one picks nothing.
    """
    if targets is None:
        return [name for name in names if name != "lm_head"]
    unknown = [t for t in targets if not any(_matches(name, t) for name in names)]
    if unknown:
        leaves = sorted({name.rpartition(".")[2] for name in names})
        raise InputError(
            f"--lora-targets {','.join(unknown)}: the model has no such linear.",
            next_step=f"Its linears are {', '.join(leaves)}.",
        )
    return [name for name in names if any(_matches(name, t) for t in targets)]


def adapters(decoder: Decoder) -> dict[str, Adapter]:
    """The adapters on a model, by the path of their linear."""
    return dict(_adapted(decoder))


def detach(decoder: Decoder) -> None:
    """Remove every adapter; the frozen linears take their places again."""
    for name, module in list(decoder.named_modules()):
        if isinstance(module, AdaptedLinear):
            decoder.set_submodule(name, module.base)


def _adapted(decoder: Decoder) -> Iterator[tuple[str, Adapter]]:
    for name, module in decoder.named_modules():
        if isinstance(module, AdaptedLinear):
            yield name, module.adapter


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
