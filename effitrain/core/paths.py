"""The names of a decoder's parts, in checkpoints as in the model."""

import re

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
_IN_LAYER = re.compile(r"model\.layers\.(\d+)(\.|$)")


def path_of(layer: int, *inside: str) -> str:
    """The path of a layer, or of what lies inside: ``path_of(3, "mlp.down_proj", "weight")`` gives
    ``model.layers.3.mlp.down_proj.weight``.
    """
    return ".".join(("model.layers", str(layer), *inside))


def layer_of(path: str) -> int | None:
    """The layer that ``path`` leads to or into; None for what lies outside of them."""
    found = _IN_LAYER.match(path)
    return int(found[1]) if found else None
