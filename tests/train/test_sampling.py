"""Which layers come in which round: rates, turns, seats, and what weighs."""

from itertools import islice, pairwise

import pytest
import torch

from effitrain.io.synthetic import shapes_of
from effitrain.model.load import find_base
from effitrain.train.sampling import Sampler, chances

ROUNDS = 10_000


def rates(sampler: Sampler, rounds: int = ROUNDS) -> list[float]:
    counts = [0] * sampler.layers
    for number in range(rounds):
        layers = sampler.sample(number)
        assert len({*layers}) == sampler.active and layers == tuple(sorted(layers))
        for layer in layers:
            counts[layer] += 1
    return [count / rounds for count in counts]


@pytest.mark.parametrize(("kind", "layers", "active"), [("uniform", 12, 2), ("uniform", 7, 3), ("shuffle", 7, 3)])
def test_every_layer_comes_as_often_as_it_should(kind, layers, active):
    p = active / layers
    sigma = (p * (1 - p) / ROUNDS) ** 0.5
    assert all(abs(rate - p) < 4 * sigma for rate in rates(Sampler(kind, layers, active, seed=3)))


def test_weights_weigh():
    found = rates(Sampler("norm", 4, 1, 0, (1.0, 2.0, 3.0, 4.0)))
    for rate, p in zip(found, (0.1, 0.2, 0.3, 0.4), strict=True):
        assert abs(rate - p) < 4 * (p * (1 - p) / ROUNDS) ** 0.5


@pytest.mark.parametrize(("layers", "active"), [(80, 2), (7, 3), (5, 5), (6, 4)])
def test_a_bag_holds_every_layer(layers, active):
    sampler, rounds = Sampler("shuffle", layers, active, 1), -(-layers // active)
    for bag in range(3):
        taken = {layer for number in range(rounds) for layer in sampler.sample(bag * rounds + number)}
        assert taken == set(range(layers))


def test_a_round_depends_on_seed_and_number_alone():
    one, other = Sampler("uniform", 30, 3, 5), Sampler("uniform", 30, 3, 5)
    later = [one.sample(number) for number in range(50)][40]
    assert other.sample(40) == later
    assert [Sampler("uniform", 30, 3, 6).sample(n) for n in range(20)] != [one.sample(n) for n in range(20)]


@pytest.mark.parametrize("kind", ["uniform", "shuffle"])
def test_who_stays_keeps_the_seat(kind):
    sampler = Sampler(kind, 5, 3, 2)
    seats = list(islice(sampler.seating(), 40))
    for number, (before, after) in enumerate(pairwise(seats), 1):
        assert sorted(after) == list(sampler.sample(number))
        assert all(b == a for b, a in zip(before, after, strict=True) if b in after)


class Chosen:
    """Weights of a model that are one, but for layers whose are as told."""

    trusted = True

    def __init__(self, spec, scale, outliers):
        self.shapes, self.scale, self.outliers = shapes_of(spec), scale, outliers

    def is_nf4(self, name):
        return False

    def read(self, name, device="cpu"):
        layer, tensor = int(name.split(".")[2]), torch.ones(self.shapes[name])
        tensor.view(-1)[: self.outliers.get(layer, 1)] = 50.0
        return tensor * self.scale.get(layer, 1.0)


def test_chances_follow_norms_and_outliers(tiny_model):
    spec = find_base(str(tiny_model("llama", layers=3))).spec
    assert chances("uniform", spec, None) == ()
    norms = chances("norm", spec, Chosen(spec, {2: 3.0}, {}))
    assert norms[0] == pytest.approx(norms[1]) and norms[2] == pytest.approx(3 * norms[0])
    outliers = chances("outliers", spec, Chosen(spec, {2: 3.0}, {1: 4}))
    assert outliers[0] == pytest.approx(outliers[2]) and outliers[1] == pytest.approx(4 * outliers[0])
