"""Random order, the same for the same seed: at a ratio of 0.75 as good as gradients in LoRAM's tables."""

import torch
from torch import Tensor

from effitrain.adapters.base import generator
from effitrain.core.spec import Axis
from effitrain.pruning.scores.seen import SeenLayer

NEEDS = "nothing"


def score(layer: SeenLayer, part: Axis) -> Tensor:
    """Uniform numbers that depend on seed, layer and part alone."""
    source = generator(torch.device("cpu"), layer.seed, layer.spec.index, str(part))
    return torch.rand(layer.groups(part), generator=source)
