"""Which layers LISA trains in which round (Pan et al. 2024): a pure function of seed and round, so nothing is kept."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from effitrain.adapters.base import generator
from effitrain.core.paths import path_of
from effitrain.core.spec import ModelSpec
from effitrain.io.nf4 import NF4Tensor
from effitrain.quant.nf4 import dequantize
from effitrain.quant.read import Weights, read_frozen

OUTLIER = 5.0  # times the mean magnitude of a matrix, from which on a weight is an outlier (Li et al. 2024, OwLore)


@dataclass(frozen=True)
class Sampler:
    """Picks ``active`` of ``layers``.

    ``kind``: ``uniform`` draws every round anew; ``shuffle`` goes through all layers before any comes again (a last
    round with too few left takes some of the first); else layers come in proportion to ``weights``, one for each.
    """

    kind: str
    layers: int
    active: int
    seed: int
    weights: tuple[float, ...] = ()

    def sample(self, number: int) -> tuple[int, ...]:
        """The layers of round ``number``, in order."""
        cpu = torch.device("cpu")
        if self.kind == "shuffle":
            bag, place = divmod(number, -(-self.layers // self.active))
            order = torch.randperm(self.layers, generator=generator(cpu, self.seed, "lisa", bag)).tolist()
            taken = order[place * self.active :][: self.active]
            return tuple(sorted([*taken, *order[: self.active - len(taken)]]))
        chances = torch.tensor(self.weights or [1.0] * self.layers, dtype=torch.float64)
        source = generator(cpu, self.seed, "lisa", number)
        return tuple(sorted(torch.multinomial(chances, self.active, generator=source).tolist()))

    def seating(self) -> Iterator[tuple[int, ...]]:
        """The layers of every round by seat: who stays keeps its seat, who comes takes a free one."""
        number, seats = 0, self.sample(0)
        while True:
            yield seats
            number += 1
            now = self.sample(number)
            coming = iter([layer for layer in now if layer not in seats])
            seats = tuple(layer if layer in now else next(coming) for layer in seats)


def chances(kind: str, spec: ModelSpec, weights: Weights) -> tuple[float, ...]:
    """What ``--lisa-sampling norm`` or ``outliers`` weighs layers by; nothing for the other kinds.

    Args:
        kind: ``norm``: root mean square of a layer's weights; ``outliers``: share of them beyond five times the mean
            magnitude of their matrix.
        spec: the model's shape.
        weights: the model's own, read one matrix at a time.
    """
    if kind not in ("norm", "outliers"):
        return ()
    count = _outliers if kind == "outliers" else _squares
    scores = [
        sum(count(matrix) for matrix in matrices(spec, weights, layer.index)) / layer.weights for layer in spec.layers
    ]
    floor = max(scores) * 1e-3  # every layer has a chance
    return tuple(max(score, floor) ** (0.5 if kind == "norm" else 1.0) for score in scores)


def matrices(spec: ModelSpec, weights: Weights, layer: int) -> Iterator[Tensor]:
    """The matrices of a layer in float32, as the checkpoint has them."""
    for linear in spec.layers[layer].linears:
        yield full_precision(weights, path_of(layer, linear.name, "weight"), (linear.out_features, linear.in_features))


def full_precision(weights: Weights, name: str, shape: Sequence[int]) -> Tensor:
    """One matrix in float32, on the host."""
    found = read_frozen(weights, name, tuple(shape), "none", torch.float32)
    return dequantize(found, torch.float32) if isinstance(found, NF4Tensor) else found


def _squares(matrix: Tensor) -> float:
    return float(matrix.square().sum())


def _outliers(matrix: Tensor) -> float:
    size = matrix.abs()
    return float((size > OUTLIER * size.mean()).sum())
