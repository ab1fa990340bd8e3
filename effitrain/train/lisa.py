"""LISA (Pan et al. 2024): a few layers are trained at a time, and others every so many steps.

What is trained sits in seats: a fixed set of float32 parameters, one for each tensor of a layer, that layers take turns
in. So an optimizer sees the same parameters for the whole run, and bytes of masters, gradients and states never grow.
Where a layer waits between its turns, and in which form, is its home's matter (``homes.py``).
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from effitrain.train.homes import Home, Seat
from effitrain.train.hooks import Hook, StepRecord
from effitrain.train.sampling import Sampler
from effitrain.train.state import TrainState

_STATES = ("step", "exp_avg", "exp_avg_sq")  # of torch's AdamW


class Lisa(Hook):
    """Switches layers at the first step of a round.

    Args:
        home: of the layers.
        sampler: decides on the layers of each round.
        interval: steps of a round.
        first: the layers that are trained to begin with, for a trial step; ``begin`` sets those of the run.
        always: what is trained in every round, by name.
        keep_states: optimizer states of leaving layers wait on the host; otherwise they are dropped.

    Attributes:
        optimizer: set when it is made.
        tensors: what the optimizer gets, and behind it all that a checkpoint must hold besides; kept up to date.
    """

    def __init__(
        self, home: Home, sampler: Sampler, interval: int, first: Sequence[int], always: dict[str, nn.Parameter],
        keep_states: bool = False,
    ):  # fmt: skip
        self.home, self.sampler, self.interval, self.always = home, sampler, interval, always
        self.keep_states = keep_states
        self.optimizer: torch.optim.Optimizer | None = None
        self.visits = [0] * sampler.layers
        self._kept: dict[int, dict[str, dict[str, Tensor]]] = {}
        self._layers = tuple(first)
        self.seats = [self.home.seat() for _ in first]
        for layer, seat in zip(first, self.seats, strict=True):
            home.enter(layer, seat)
        self._rounds = sampler.seating()
        self._round = -1
        self.tensors: dict[str, Tensor] = {}
        self._note()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained, in an order that never changes."""
        return [*self.always.values(), *(parameter for seat in self.seats for parameter in seat.values())]

    def begin(self, step: int) -> None:
        """Go to the state after ``step`` steps but for the values, which a checkpoint holds."""
        for layer, seat in zip(self._layers, self.seats, strict=True):
            self.home.forget(layer, seat)
        done = max(0, step - 1) // self.interval
        rounds = list(islice(self._rounds, done + 1))
        self._round, self._layers = done, rounds[-1]
        for layers in rounds:
            self._count(layers)
        visited = {layer for layers in rounds for layer in layers} - {*self._layers}
        for layer in sorted(visited):
            self.home.expect(layer)
            if self.keep_states:
                self._kept[layer] = {path: self._no_states(p) for path, p in self.seats[0].items()}
        for layer, seat in zip(self._layers, self.seats, strict=True):
            self.home.enter(layer, seat)
        self._note()

    def before_step(self, state: TrainState) -> None:
        """Switch where a round begins."""
        if state.step // self.interval > self._round:
            self._switch()

    def after_step(self, state: TrainState, record: StepRecord) -> None:
        """Count what is held at a round's end."""
        if state.step % self.interval == 0:
            state.round_bytes.append(self.held_bytes())

    def end(self) -> None:
        """Every layer goes home: what was trained stands where it is used from now on."""
        for layer, seat in zip(self._layers, self.seats, strict=True):
            self.home.leave(layer, seat)

    def facts(self, state: TrainState) -> dict[str, Any]:
        """The report's ``lisa``: rounds, rounds by layer, and the bytes of masters, gradients and states by round."""
        return {
            "rounds": self._round + 1,
            "layers_visited": sum(count > 0 for count in self.visits),
            "visits": self.visits,
            "state_bytes": state.round_bytes,
            **self.home.facts(),
        }

    def held_bytes(self) -> int:
        """Bytes of masters, their gradients as large as they, and optimizer states on the device."""
        assert self.optimizer is not None
        states = [t for p in self.parameters for t in self.optimizer.state[p].values() if isinstance(t, Tensor)]
        return sum(2 * p.nbytes for p in self.parameters) + sum(t.nbytes for t in states if t.dim())

    def _switch(self) -> None:
        before, self._layers = self._layers, next(self._rounds)
        self._round += 1
        self._count(self._layers)
        moves = [move for move in zip(before, self._layers, self.seats, strict=True) if move[0] != move[1]]
        for leaving, _, seat in moves:
            self._put_away(leaving, seat)
            self.home.leave(leaving, seat)
        for _, entering, seat in moves:
            self.home.enter(entering, seat)
            self._take_out(entering, seat)
        self._note()

    def _put_away(self, layer: int, seat: Seat) -> None:
        """The optimizer forgets the seat; its states stay on the host where they are wanted again."""
        assert self.optimizer is not None
        for path, parameter in seat.items():
            states = self.optimizer.state.pop(parameter, {})
            if self.keep_states:
                self._kept.setdefault(layer, {})[path] = {key: states[key].cpu().clone() for key in _STATES}

    def _take_out(self, layer: int, seat: Seat) -> None:
        assert self.optimizer is not None
        for path, states in self._kept.pop(layer, {}).items():
            parameter = seat[path]
            self.optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in states.items()}

    def _no_states(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        shapes: dict[str, Sequence[int]] = {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
        return {key: torch.zeros(shapes[key]) for key in _STATES}

    def _count(self, layers: Sequence[int]) -> None:
        for layer in layers:
            self.visits[layer] += 1

    def _note(self) -> None:
        self.tensors.clear()
        self.tensors.update(self.always)
        for number, seat in enumerate(self.seats):
            self.tensors.update({f"seat.{number}.{path}": parameter for path, parameter in seat.items()})
        self.tensors.update(self.home.waiting(self._layers))
        self.tensors.update(self._states())

    def _states(self) -> Iterator[tuple[str, Tensor]]:
        for layer, paths in sorted(self._kept.items()):
            for path, states in paths.items():
                yield from ((f"states.{layer}.{path}.{key}", value) for key, value in states.items())


def extremes(layers: int, active: int) -> tuple[int, ...]:
    """The layers that take most to train at once: the first, to which the backward pass must come, and the last."""
    return (0,) if active == 1 else (*range(active - 1), layers - 1)
