"""From scores to what is kept: a pure function."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from effitrain.core.errors import InputError
from effitrain.core.keep import LayerKeep
from effitrain.core.spec import Axis, ModelSpec, Widths

Scores = Mapping[int, Mapping[Axis, Tensor]]


def select(spec: ModelSpec, widths: Sequence[Widths], scores: Scores) -> list[LayerKeep]:
    """The groups of the highest scores in every layer; of equal ones the first.

    Args:
        spec: of the full-size model.
        widths: how many groups each layer keeps.
        scores: [groups] by layer and part, for every layer and part that loses some.

    Raises:
        InputError: a score is NaN.
    """
    return [
        LayerKeep(
            _best(scores, index, Axis.FFN, whole.ffn, kept.ffn),
            _best(scores, index, Axis.KV_HEADS, whole.kv_heads, kept.kv_heads),
        )
        for index, (whole, kept) in enumerate(zip(spec.widths, widths, strict=True))
    ]


def _best(scores: Scores, index: int, part: Axis, groups: int, kept: int) -> tuple[int, ...]:
    if kept == groups:
        return tuple(range(groups))
    values = scores[index][part]
    if values.isnan().any():
        raise InputError(f"A score of layer {index} ({part}) is not a number.", next_step="Score the model again.")
    order = torch.argsort(values, descending=True, stable=True)
    return tuple(sorted(order[:kept].tolist()))
