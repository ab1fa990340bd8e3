"""Which layer is copied into which slot, and when: a pure function of the order in which layers are used."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Copy:
    """``layer`` into ``slot``, once the first ``after`` uses are over."""

    layer: int
    slot: int
    after: int


@dataclass(frozen=True)
class Use:
    """``layer`` is used in ``slot``, once the first ``copies`` copies are done."""

    layer: int
    slot: int
    copies: int


@dataclass(frozen=True)
class Schedule:
    """The uses of a pass and the copies that they need, both in order."""

    uses: tuple[Use, ...]
    copies: tuple[Copy, ...]


@lru_cache(maxsize=64)  # every step asks the same
def schedule(order: tuple[int, ...], holds: tuple[int | None, ...]) -> Schedule:
    """The copies for using layers in ``order``, with ``holds[s]`` in slot ``s`` at the beginning.

    A layer that is in a slot is not copied. Another takes the slot of the layer that is needed last (Belady 1966), of
    equals the one used longest ago, among the slots that are free before the use just ahead: so the copy has that
    use to hide behind. For S streamed layers, N slots (N < S) and m passes forward and backward these are
    S + (2m - 1)(S - N) copies from cold slots, and 2m (S - N) from the slots that such a pass leaves behind.
    """
    now, last = list(holds), [-1] * len(holds)
    uses: list[Use] = []
    copies: list[Copy] = []
    for turn, layer in enumerate(order):
        if layer not in now:
            slot = _victim(order, turn, now, last)
            copies.append(Copy(layer, slot, last[slot] + 1))
            now[slot] = layer
        slot = now.index(layer)
        last[slot] = turn
        uses.append(Use(layer, slot, len(copies)))
    return Schedule(tuple(uses), tuple(copies))


def _victim(order: Sequence[int], turn: int, now: Sequence[int | None], last: Sequence[int]) -> int:
    """The slot to give away for the layer of ``turn``."""

    def rank(slot: int) -> tuple[int, int]:
        layer = now[slot]
        needed = next((k for k in range(turn, len(order)) if order[k] == layer), len(order))
        return needed, -last[slot]

    free = [slot for slot in range(len(now)) if last[slot] < turn - 1]
    return max(free or range(len(now)), key=rank)
