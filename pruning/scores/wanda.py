"""Wanda (Sun et al. 2024) for structures: |W_ij| ||x_j|| summed over the group's columns.

Only the members that read the group count, down_proj and o_proj: their inputs are what pruning removes.
"""

from torch import Tensor

from effitrain.core.spec import Axis
from effitrain.pruning.scores.seen import Seen, SeenLayer

NEEDS = "inputs"


def score(layer: SeenLayer, part: Axis) -> Tensor:
    """Sum over outputs of |W| times the norm of the input over the calibration tokens."""
    return layer.add_up(part, _importance)


def _importance(seen: Seen, dim: int) -> Tensor | None:
    assert seen.squares is not None
    return seen.weight.abs().sum(0) * seen.squares.sqrt() if dim == 1 else None
