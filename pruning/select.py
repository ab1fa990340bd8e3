"""From scores to what is kept: pure functions."""

import math
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


def shared_out(spec: ModelSpec, widths: Sequence[Widths], scores: Scores, multiple: int) -> tuple[Widths, ...]:
    """Widths of the same sums for the layers that lose something, more for those whose groups score higher: all layers
    rank together. Scores are brought to mean 0 and deviation 1 in each layer first, as in FLAP (An et al. 2024): their
    size grows with depth.

    Args:
        spec: of the full-size model.
        widths: how many groups each layer would keep by itself.
        scores: as for ``select``.
        multiple: FFN channels go in runs of so many; each layer keeps one run and one KV head at least.

    Raises:
        InputError: a score is NaN.
    """
    ffn = _share([w.ffn for w in spec.widths], [w.ffn for w in widths], scores, Axis.FFN, multiple)
    kv = _share([w.kv_heads for w in spec.widths], [w.kv_heads for w in widths], scores, Axis.KV_HEADS, 1)
    return tuple(Widths(*pair) for pair in zip(ffn, kv, strict=True))


def _share(whole: list[int], cut: list[int], scores: Scores, part: Axis, step: int) -> list[int]:
    pruned = [index for index, full in enumerate(whole) if cut[index] < full]
    runs = []
    for index in pruned:
        values = _checked(scores, index, part)
        ordered = ((values - values.mean()) / values.std().clamp_min(1e-12)).sort(descending=True).values
        for place, run in enumerate(ordered.split(step)):
            runs.append((run.mean().item() if place else math.inf, index, len(run)))
    sizes, left = list(cut), sum(cut[index] for index in pruned)
    for index in pruned:
        sizes[index] = 0
    for _, index, size in sorted(runs, key=lambda run: -run[0]):
        if size > left:
            break
        sizes[index] += size
        left -= size
    return sizes


def _best(scores: Scores, index: int, part: Axis, groups: int, kept: int) -> tuple[int, ...]:
    if kept == groups:
        return tuple(range(groups))
    order = torch.argsort(_checked(scores, index, part), descending=True, stable=True)
    return tuple(sorted(order[:kept].tolist()))


def _checked(scores: Scores, index: int, part: Axis) -> Tensor:
    values = scores[index][part]
    if values.isnan().any():
        raise InputError(f"A score of layer {index} ({part}) is not a number.", next_step="Score the model again.")
    return values
