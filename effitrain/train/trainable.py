"""Makes of a loaded model one that trains what the recipe's method says."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from effitrain.adapters.attach import attach
from effitrain.adapters.base import Adapter, AdapterConfig, Clock
from effitrain.adapters.full import load_in_full, train_in_full
from effitrain.adapters.storage import adapter_folder, load_into, read_adapter
from effitrain.core.methods import SAMPLED, adapter_kind
from effitrain.core.paths import layer_of
from effitrain.core.recipe import Recipe
from effitrain.core.weights import busy_layers, trains_tables
from effitrain.model.decoder import Decoder
from effitrain.model.trained import train_all, train_tables
from effitrain.quant.read import DTYPES, Weights
from effitrain.train.adapter_homes import Adapters, Deltas
from effitrain.train.homes import Home, Resident
from effitrain.train.host_home import OnHost
from effitrain.train.lisa import Lisa, extremes
from effitrain.train.sampling import Sampler, chances


@dataclass(frozen=True)
class Trainable:
    """What is trained.

    Attributes:
        adapters: by module path; none where the model's own weights are trained.
        tensors: by name what a checkpoint holds, the optimizer's parameters first.
        parameters: what the optimizer gets.
        lisa: switches layers, where few are trained at a time.
    """

    adapters: dict[str, Adapter]
    tensors: dict[str, Tensor]
    parameters: list[nn.Parameter]
    lisa: Lisa | None = None


def make_trainable(
    decoder: Decoder,
    recipe: Recipe,
    clock: Clock,
    original: Callable[[], Weights],
    active: Sequence[int] | None = None,
) -> Trainable:
    """Give ``decoder`` the parameters that are trained, and in training the attention that the recipe asks for.

    Args:
        decoder: loaded.
        recipe: with every choice made.
        clock: of the adapters' random choices.
        original: asked for the model's weights as the checkpoint has them, where layers take turns.
        active: layers that LISA trains in a trial step; those that take most when left out.

    Raises:
        InputError: an adapter to go on from does not fit.
    """
    decoder.set_shifted_group(recipe.s2_group if recipe.attention == "s2" else None)
    adapters: dict[str, Adapter] = {}
    if recipe.method == "full":
        train_all(decoder)
    if adapter_kind(recipe.method) is not None:
        adapters = attach(decoder, AdapterConfig.of(recipe), clock)
        train_in_full(decoder, recipe.train_norms, recipe.train_embeddings)
    if recipe.init_adapter:
        bundle = read_adapter(adapter_folder(recipe.init_adapter))
        load_into(adapters, bundle, recipe.init_adapter)
        load_in_full(decoder, bundle.full)
    if recipe.method in SAMPLED:
        lisa = _lisa(decoder, recipe, original(), adapters, active)
        return Trainable(adapters, lisa.tensors, lisa.parameters, lisa)
    named = _trained(decoder)
    return Trainable(adapters, {**named}, list(named.values()))


def _lisa(
    decoder: Decoder, recipe: Recipe, original: Weights, adapters: dict[str, Adapter], active: Sequence[int] | None
) -> Lisa:
    in_layers = {path: adapter for path, adapter in adapters.items() if layer_of(path) is not None}
    for adapter in in_layers.values():
        adapter.requires_grad_(False)
    if trains_tables(decoder.spec, recipe):
        train_tables(decoder)
    always, layers = _trained(decoder), decoder.spec.num_layers
    home, count = _home(decoder, recipe, original, in_layers), busy_layers(decoder.spec, recipe)
    weights = chances(recipe.lisa_sampling, decoder.spec, original)
    sampler = Sampler(recipe.lisa_sampling, layers, count, recipe.seed, weights)
    first = extremes(layers, count) if active is None else active
    return Lisa(home, sampler, recipe.lisa_interval, first, always, recipe.lisa_state == "keep-host")


def _home(decoder: Decoder, recipe: Recipe, original: Weights, adapters: dict[str, Adapter]) -> Home:
    dtype = DTYPES[recipe.dtype]
    if recipe.method == "lisa-lora":
        return Adapters(decoder, adapters)
    if recipe.method == "lisa-delta":
        return Deltas(decoder, adapters)
    if decoder.streamer is None:
        return Resident(decoder, dtype)
    return OnHost(decoder, original, recipe.quant, dtype, recipe.dtype)


def _trained(decoder: Decoder) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in decoder.named_parameters() if parameter.requires_grad}
