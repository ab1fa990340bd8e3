"""The two ways to fill a slot: by the processor, at a chosen speed, or by the card's copy engine."""

import time
from typing import Any

import torch
from torch import Tensor

from effitrain.stream.engine import Kind
from effitrain.stream.host import HostLayers
from effitrain.stream.pinned import pinned_empty


class CpuMover:
    """Copies within host memory: the device is the processor.

    Args:
        host: where the layers wait.
        slots: to fill.
        bytes_per_second: makes copies as slow as a link of this speed; None leaves them as fast as they are.
    """

    def __init__(self, host: HostLayers, slots: list[Tensor], bytes_per_second: float | None = None):
        self.host, self.slots, self.rate = host, slots, bytes_per_second

    def prepare(self, layer: int) -> None:
        """Have it read ahead."""
        self.host.read_ahead(layer)

    def reclaim(self, slot: int) -> None:
        """Nothing: a slot that was released is no longer read."""

    def move(self, layer: int, slot: int) -> int:
        """Fill ``slot``; done when this returns."""
        started = time.perf_counter()
        size = self.host.layout(layer).nbytes
        target, blob = self.slots[slot][:size], self.host.blobs.get(layer)
        if blob is None:
            self.host.source.read_into(layer, target)
        else:
            # numpy's copy takes one thread; torch's would start a team of its own in the copying thread.
            target.numpy()[:] = blob.numpy()
        if self.rate:
            time.sleep(max(0.0, size / self.rate - (time.perf_counter() - started)))
        return size

    def acquire(self, slot: int) -> None:
        """Nothing: a copy is done when it is counted."""

    def release(self, slot: int) -> None:
        """Nothing: the computation is done when it returns."""

    def mark(self, kind: Kind) -> float:
        """The clock."""
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        """Their difference."""
        return end - start


class CudaMover:
    """Copies on a stream of their own; events keep both streams from overtaking each other.

    Pinned layers go to the card as they are. Pageable ones and those on disk go through two pinned buffers, so that
    one is read while the other is on its way.
    """

    def __init__(self, host: HostLayers, slots: list[Tensor]):
        self.host, self.slots, self.device = host, slots, slots[0].device
        self.stream = torch.cuda.Stream(self.device)
        # The slots' memory may have been another tensor's, whose last kernels still run.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        for slot in slots:  # after a pass that broke off, a copy may still be under way when the slots are let go
            slot.record_stream(self.stream)
        self._filled: dict[int, torch.cuda.Event] = {}
        self._free: dict[int, torch.cuda.Event] = {}
        self._staging: list[Tensor] = []
        self._left: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def prepare(self, layer: int) -> None:
        """Have it read ahead."""
        self.host.read_ahead(layer)

    def reclaim(self, slot: int) -> None:
        """The copying stream waits for the last use of ``slot``."""
        free = self._free.get(slot)
        if free is not None:
            self.stream.wait_event(free)

    def move(self, layer: int, slot: int) -> int:
        """Begin to fill ``slot``."""
        size = self.host.layout(layer).nbytes
        blob = self.host.blobs.get(layer)
        staged = blob is None or layer in self.host.pageable
        source = self._stage(layer, size) if staged else blob
        assert source is not None
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            self.slots[slot][:size].copy_(source, non_blocking=True)
            self._filled[slot] = self.stream.record_event()
            if staged:
                self._left[self._turn] = self._filled[slot]
                self._turn = 1 - self._turn
        return size

    def acquire(self, slot: int) -> None:
        """The current stream waits for the copy into ``slot``."""
        torch.cuda.current_stream(self.device).wait_event(self._filled[slot])

    def release(self, slot: int) -> None:
        """The next copy into ``slot`` waits for the current stream."""
        self._free[slot] = torch.cuda.current_stream(self.device).record_event()

    def mark(self, kind: Kind) -> Any:
        """An event on the stream that copies or the one that computes."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(self.stream if kind == "copy" else torch.cuda.current_stream(self.device))
        return event

    def seconds(self, start: Any, end: Any) -> float | None:
        """Time between two events that have both happened."""
        return start.elapsed_time(end) / 1000 if start.query() and end.query() else None

    def _stage(self, layer: int, size: int) -> Tensor:
        """The bytes of ``layer`` in the pinned buffer whose turn it is, when its last copy has left it."""
        if not self._staging:
            largest = max(slot.nbytes for slot in self.slots)
            self._staging = [pinned_empty((largest,), torch.uint8, self.device) for _ in range(2)]
        left = self._left[self._turn]
        if left is not None:
            left.synchronize()
        target, blob = self._staging[self._turn][:size], self.host.blobs.get(layer)
        if blob is None:
            self.host.source.read_into(layer, target)
        else:
            target.numpy()[:] = blob.numpy()
        return target


class NoMover(CpuMover):
    """Moves nothing: for steps that are run on shapes alone."""

    def move(self, layer: int, slot: int) -> int:
        """Only say how much it would be."""
        return self.host.layout(layer).nbytes
