"""FLAP (An et al. 2024): how much a channel varies, times the squared norm of the column that reads it.

A channel that hardly varies can go and leave its mean behind: as a bias of o_proj and down_proj with ``--align bias``,
or in their weights with ``--align lsq``.
"""

from torch import Tensor

from effitrain.core.spec import Axis
from effitrain.pruning.scores.seen import Seen, SeenLayer

NEEDS = "inputs"


def score(layer: SeenLayer, part: Axis) -> Tensor:
    """Weighted input variance; that of heads is squared once more, as in FLAP's code."""
    raw = layer.add_up(part, _importance)
    return raw.square() if part == Axis.KV_HEADS else raw


def _importance(seen: Seen, dim: int) -> Tensor | None:
    if dim == 0:
        return None
    assert seen.sums is not None and seen.squares is not None
    mean = seen.sums / seen.count
    variance = (seen.squares / seen.count - mean.square()).clamp_min(0) * (seen.count / max(1, seen.count - 1))
    return variance * seen.weight.square().sum(0)
