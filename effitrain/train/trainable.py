"""Makes of a loaded model one that trains what the recipe's method says."""

from effitrain.adapters.attach import attach
from effitrain.adapters.base import Adapter, AdapterConfig, Clock
from effitrain.adapters.full import train_in_full
from effitrain.core.recipe import Recipe
from effitrain.model.decoder import Decoder
from effitrain.model.trained import train_all


def make_trainable(decoder: Decoder, recipe: Recipe, clock: Clock) -> dict[str, Adapter]:
    """Give ``decoder`` the parameters that are trained, and in training the attention that the recipe asks for; returns
    the adapters by module path.
    """
    decoder.set_shifted_group(recipe.s2_group if recipe.attention == "s2" else None)
    if recipe.method == "full":
        train_all(decoder)
        return {}
    adapters = attach(decoder, AdapterConfig.of(recipe), clock)
    train_in_full(decoder, recipe.train_norms, recipe.train_embeddings)
    return adapters
