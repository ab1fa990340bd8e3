"""Which layers stay on the device, and where the others wait for their turn: a pure function of integers."""

from dataclasses import dataclass
from functools import cached_property, lru_cache


@dataclass(frozen=True)
class Placement:
    """Where the frozen weights of each decoder layer are.

    Attributes:
        num_layers: of the decoder.
        resident: layers on the device for good.
        on_disk: streamed layers that are read from the store each time; the other streamed layers wait in host memory.
        slots: places on the device that streamed layers take turns in; 2 let a copy run beside the computation.
    """

    num_layers: int
    resident: frozenset[int]
    on_disk: frozenset[int]
    slots: int

    @cached_property
    def streamed(self) -> tuple[int, ...]:
        """The layers that visit the device, in order."""
        return tuple(layer for layer in range(self.num_layers) if layer not in self.resident)

    @cached_property
    def in_host_memory(self) -> tuple[int, ...]:
        """The streamed layers that wait in host memory."""
        return tuple(layer for layer in self.streamed if layer not in self.on_disk)


@lru_cache(maxsize=1024)  # the search of a plan asks the same many times
def place(num_layers: int, resident_layers: int, slots: int = 3, disk_layers: int = 0) -> Placement:
    """Resident layers spread evenly, so that every copy has computation to hide behind; of the others ``disk_layers``
    spread evenly too, so that reading from disk has copies from memory to hide behind.

    Raises:
        ValueError: more layers than there are, or no slot for streamed layers.
    """
    streamed = num_layers - resident_layers
    if resident_layers < 0 or streamed < 0 or not 0 <= disk_layers <= streamed or (streamed and slots < 1):
        raise ValueError(f"{resident_layers} resident, {disk_layers} on disk, {slots} slots for {num_layers} layers")
    resident = _spread(range(num_layers), resident_layers)
    others = [layer for layer in range(num_layers) if layer not in resident]
    return Placement(num_layers, resident, _spread(others, disk_layers), min(slots, streamed))


def _spread(items: list[int] | range, count: int) -> frozenset[int]:
    """``count`` of ``items`` at even distances."""
    return frozenset(items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count))
