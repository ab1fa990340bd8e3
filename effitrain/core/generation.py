"""How many texts may be generated at a time: their keys and values must lie beside the weights."""

from effitrain.core.budget import MemoryBudget
from effitrain.core.forward import resident_lines
from effitrain.core.ledger import Settings, gpu_bytes
from effitrain.core.recipe import Recipe
from effitrain.core.spec import LayerSpec, ModelSpec


def texts_at_once(spec: ModelSpec, recipe: Recipe, settings: Settings, budget: MemoryBudget, tokens: int) -> int:
    """How many texts of ``tokens`` have room for their keys, values and hidden states on the device, beside
    weights and adapter and one layer at work; 0 where not even one has.
    """
    room = budget.gpu_bytes - gpu_bytes(resident_lines(spec, recipe, settings, budget))
    return max(0, (room - _busiest(spec, settings, tokens)) // _each(spec, settings, tokens))


def generation_bytes(spec: ModelSpec, settings: Settings, tokens: int, texts: int) -> int:
    """Bytes on the device that generating so many texts of ``tokens`` takes beside weights and adapter."""
    logits = spec.vocab * (settings.width + 4)
    return max(_busiest(spec, settings, tokens), logits) + texts * _each(spec, settings, tokens)


def _each(spec: ModelSpec, settings: Settings, tokens: int) -> int:
    """A text's keys, values and hidden states."""
    cached = sum(2 * _width(layer, "k_proj") * count for layer, count in spec.shapes)
    return tokens * (cached + spec.hidden) * settings.width


def _busiest(spec: ModelSpec, settings: Settings, tokens: int) -> int:
    return max(_at_work(layer, spec, settings, tokens) for layer, _ in spec.shapes)


def _at_work(layer: LayerSpec, spec: ModelSpec, settings: Settings, tokens: int) -> int:
    """Bytes of one layer on one text: the attention's tensors or the MLP's, a norm's in float32, and a weight."""
    wide = max(3 * min(tokens, settings.tile) * _width(layer, "gate_proj"), 4 * tokens * _width(layer, "q_proj"))
    weight = max(linear.weights for linear in layer.linears)
    return (wide + 3 * tokens * spec.hidden + weight) * settings.width + 2 * 4 * tokens * spec.hidden


def _width(layer: LayerSpec, leaf: str) -> int:
    return next(linear.out_features for linear in layer.linears if linear.leaf == leaf)
