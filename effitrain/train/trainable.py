"""Makes of a loaded model one that trains what the recipe's method says."""

from effitrain.adapters.attach import attach
from effitrain.adapters.base import Adapter, AdapterConfig, Clock
from effitrain.core.recipe import Recipe
from effitrain.model.decoder import Decoder
from effitrain.model.trained import train_all


def make_trainable(decoder: Decoder, recipe: Recipe, clock: Clock) -> dict[str, Adapter]:
    """Give ``decoder`` the parameters that are trained; the adapters among them by module path."""
    if recipe.method == "full":
        train_all(decoder)
        return {}
    return attach(decoder, AdapterConfig.of(recipe), clock)
