"""Copies layers into slots ahead of their use and hands them out, with guards against a slot that was given away.

The protocol is two counts: a use waits for the copies it needs, a copy waits for the uses of what it overwrites. A
``Mover`` carries both over to the device: streams and events on CUDA, nothing on a CPU.
"""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

from effitrain.stream.schedule import Copy, Schedule, Use, schedule
from effitrain.stream.worker import Background, Inline

Kind = Literal["copy", "wait", "compute"]


class Mover(Protocol):
    """Moves bytes to a device and knows its time. Each call may come from another thread."""

    def prepare(self, layer: int) -> None:
        """``layer`` will be moved next."""

    def reclaim(self, slot: int) -> None:
        """What is copied from here on waits until the device has done what ``release`` of ``slot`` marked."""

    def move(self, layer: int, slot: int) -> int:
        """Begin to fill ``slot``, reclaimed, with the bytes of ``layer``; how many bytes."""

    def acquire(self, slot: int) -> None:
        """What is asked of the device from here on waits until ``slot`` is filled."""

    def release(self, slot: int) -> None:
        """What was asked of the device up to here is the last that reads ``slot``."""

    def mark(self, kind: Kind) -> Any:
        """This moment in the device's time, on the side that copies or on the side that computes."""

    def seconds(self, start: Any, end: Any) -> float | None:
        """Time between two marks; None while the device has not come to them."""


@dataclass
class Traffic:
    """Counts since the engine was made.

    Attributes:
        planned: layers that the schedules of the passes call for.
        copies: layers copied.
        bytes_copied: to the device; nothing is ever copied back.
        copy_seconds: time the copies took.
        wait_seconds: time the computation stood still for them.
    """

    planned: int = 0
    copies: int = 0
    bytes_copied: int = 0
    copy_seconds: float = 0.0
    wait_seconds: float = 0.0

    @property
    def hidden_share(self) -> float:
        """Share of the copy time that computation hid."""
        return max(0.0, 1 - self.wait_seconds / self.copy_seconds) if self.copy_seconds else 1.0


@dataclass(frozen=True)
class Span:
    """What happened to ``layer`` between two marks, or two times in seconds."""

    kind: Kind
    layer: int
    start: Any
    end: Any


class Engine:
    """Runs the schedule of one pass after the other.

    Args:
        mover: of the device.
        slots: how many there are.
        worker: where copies are begun.
    """

    def __init__(self, mover: Mover, slots: int, worker: Background | Inline):
        self.mover, self.worker = mover, worker
        self.traffic = Traffic()
        self.spans: list[Span] = []  # of the pass under way
        self._unsettled: deque[Span] = deque()
        self._holds: list[int | None] = [None] * slots
        self._schedule = Schedule((), ())
        self._issued = self._copied = self._freed = 0
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def begin(self, order: Sequence[int]) -> None:
        """Use layers in ``order`` from now on; what was planned before and not used is forgotten."""
        self.worker.drop()
        self._raise_error()
        self._settle()
        self.spans.clear()
        self._issued = self._copied = self._freed = 0
        self._schedule = schedule(tuple(order), tuple(self._holds))
        self.traffic.planned += len(self._schedule.copies)
        self._issue()

    def forget(self, layer: int) -> None:
        """What slots hold of ``layer`` is out of date; between passes only."""
        self.worker.wait()
        self._raise_error()
        self._holds = [None if held == layer else held for held in self._holds]

    @contextmanager
    def hold(self, layer: int) -> Iterator[int]:
        """The slot that holds ``layer``, as long as the context lasts.

        Raises:
            RuntimeError: layers are used in another order than planned, or a slot was given away while in use.
        """
        use = self._next_use(layer)
        asked = self.mover.mark("wait")
        with self._changed:
            self._changed.wait_for(lambda: self._error or self._copied >= min(use.copies, self._issued))
        self._raise_error()
        if self._copied < use.copies:
            raise RuntimeError(f"layer {layer} waits for a copy that waits for it")
        self.mover.acquire(use.slot)
        ready = self.mover.mark("wait")
        self._check(use, "is not ready")
        try:
            yield use.slot
        finally:
            self.mover.release(use.slot)
        self._check(use, "was overwritten while in use")
        self._note(Span("wait", layer, asked, ready), Span("compute", layer, ready, self.mover.mark("compute")))
        self._freed += 1
        self._issue()

    def settled(self) -> Traffic:
        """The counts, when every copy asked for so far is counted; waits for them."""
        self.worker.wait()
        self._settle()
        return self.traffic

    def timeline(self) -> list[Span]:
        """What the last pass did, in seconds from its first mark; without what the device has not come to."""
        self.worker.wait()
        found = []
        for span in self.spans:
            start = self.mover.seconds(self.spans[0].start, span.start)
            length = self.mover.seconds(span.start, span.end)
            if start is not None and length is not None:
                found.append(Span(span.kind, span.layer, start, start + length))
        return found

    def _next_use(self, layer: int) -> Use:
        uses = self._schedule.uses
        planned = uses[self._freed].layer if self._freed < len(uses) else "none"
        if planned != layer:
            raise RuntimeError(f"layer {layer} is used where the schedule has {planned}")
        return uses[self._freed]

    def _issue(self) -> None:
        """Hand over every copy whose slot is free."""
        copies = self._schedule.copies
        while self._issued < len(copies) and self._may_begin(copies[self._issued]):
            copy = copies[self._issued]
            self._issued += 1
            self.worker.add(partial(self._copy, copy, copies[self._issued : self._issued + 1]))

    def _may_begin(self, copy: Copy) -> bool:
        return copy.after <= self._freed

    def _copy(self, copy: Copy, following: Sequence[Copy]) -> None:
        try:
            self._holds[copy.slot] = None  # before the first byte changes
            for other in following:
                self.mover.prepare(other.layer)
            self.mover.reclaim(copy.slot)
            start = self.mover.mark("copy")  # after the wait for the slot, which is no time of the copy
            size = self.mover.move(copy.layer, copy.slot)
            self._holds[copy.slot] = copy.layer
            with self._changed:
                self._note(Span("copy", copy.layer, start, self.mover.mark("copy")))
                self.traffic.copies += 1
                self.traffic.bytes_copied += size
                self._copied += 1
                self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _check(self, use: Use, what: str) -> None:
        if self._holds[use.slot] != use.layer:
            raise RuntimeError(f"slot {use.slot} with layer {use.layer} {what}")

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _note(self, *spans: Span) -> None:
        self.spans.extend(spans)
        self._unsettled.extend(spans)

    def _settle(self) -> None:
        """Add up what the device has come to."""
        while self._unsettled:
            span = self._unsettled[0]
            seconds = self.mover.seconds(span.start, span.end)
            if seconds is None:
                return
            if span.kind == "copy":
                self.traffic.copy_seconds += seconds
            elif span.kind == "wait":
                self.traffic.wait_seconds += seconds
            self._unsettled.popleft()
