"""Squared norm of a group's weights (Li et al. 2017)."""

from torch import Tensor

from effitrain.core.spec import Axis
from effitrain.pruning.scores.seen import SeenLayer

NEEDS = "weights"


def score(layer: SeenLayer, part: Axis) -> Tensor:
    """Sum of w^2 over every row and column of the group."""
    return layer.add_up(part, lambda seen, dim: seen.weight.square().sum(1 - dim))
