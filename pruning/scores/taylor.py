"""First-order Taylor (LLM-Pruner, Ma et al. 2023, ``param_first``): |w dL/dw|, what the loss would change by."""

from torch import Tensor

from effitrain.core.spec import Axis
from effitrain.pruning.scores.seen import Seen, SeenLayer

NEEDS = "gradients"


def score(layer: SeenLayer, part: Axis) -> Tensor:
    """Sum of |w dL/dw| over every row and column of the group."""
    return layer.add_up(part, _importance)


def _importance(seen: Seen, dim: int) -> Tensor:
    assert seen.grad is not None
    return (seen.weight * seen.grad).abs().sum(1 - dim)
