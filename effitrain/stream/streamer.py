"""Binds frozen linears to the slot that holds their layer, for as long as it does."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from effitrain.io.blob import Weight, views
from effitrain.quant.linear import FrozenLinear
from effitrain.stream.engine import Engine, Mover, Traffic
from effitrain.stream.host import HostLayers
from effitrain.stream.movers import CpuMover, CudaMover, NoMover
from effitrain.stream.worker import Background, Inline


class Streamer:
    """The frozen linears of streamed layers: without weights except while their layer is held.

    Args:
        linears: of every streamed layer.
        host: where the weights wait.
        slots: places on ``device``, each as large as the largest layer; made here, once.
        device: where the layers compute.
        bytes_per_second: on a CPU, the speed of the link to imitate.
        shapes_only: copy nothing, for steps that are run on fake tensors.
        slot_bytes: of a slot at least; room for layers that come in another form later.

    Attributes:
        resting: layers that stream no more until they are woken.
    """

    def __init__(
        self,
        linears: Mapping[int, Sequence[FrozenLinear]],
        host: HostLayers,
        slots: int,
        device: torch.device,
        bytes_per_second: float | None = None,
        shapes_only: bool = False,
        slot_bytes: int = 0,
    ):
        self.linears, self.host = dict(linears), host
        self.resting: set[int] = set()
        size = max([slot_bytes, *(host.layout(layer).nbytes for layer in linears)])
        self.slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(slots)]
        mover: Mover
        if shapes_only:
            mover = NoMover(host, self.slots)
        elif device.type == "cuda":
            mover = CudaMover(host, self.slots)
        else:
            mover = CpuMover(host, self.slots, bytes_per_second)
        # Fake tensors and threads do not go together.
        self.engine = Engine(mover, slots, Inline() if shapes_only else Background())
        self._views: dict[tuple[int, int], dict[str, Weight]] = {}
        for layer in linears:
            self._view(layer)

    def rest(self, layer: int) -> None:
        """``layer`` does not stream until it is woken; nothing where it does not stream."""
        if self.linears.pop(layer, None) is not None:
            self.resting.add(layer)

    def wake(self, layer: int, linears: Sequence[FrozenLinear]) -> None:
        """``layer`` streams from now on, with the bytes and the layout that ``host`` has of it."""
        self.engine.forget(layer)
        self.resting.discard(layer)
        self.linears[layer] = linears
        self._view(layer)

    def _view(self, layer: int) -> None:
        for slot, blob in enumerate(self.slots):
            self._views.pop((layer, slot), None)
            self._views[layer, slot] = self._shared(layer, slot, blob)

    def _shared(self, layer: int, slot: int, blob: Tensor) -> dict[str, Weight]:
        """Views of ``blob`` for ``layer``; layers of one layout share them."""
        layout = self.host.layout(layer)
        for (other, where), known in self._views.items():
            if where == slot and self.host.layout(other) == layout:
                return known
        return views(blob, layout)

    def __contains__(self, layer: int) -> bool:
        return layer in self.linears

    def begin_pass(self, rows: int = 1, back_to: int | None = None) -> None:
        """A pass over all layers begins: forward, each layer used ``rows`` times in a row, and back down to the layer
        ``back_to``; None for no backward pass.
        """
        forward = [layer for layer in sorted(self.linears) for _ in range(rows)]
        backward = [] if back_to is None else [layer for layer in reversed(forward) if layer >= back_to]
        self.engine.begin(forward + backward)

    @contextmanager
    def hold(self, layer: int) -> Iterator[None]:
        """The linears of ``layer`` have their weights.

        Raises:
            RuntimeError: layers are used in another order than that of the pass.
        """
        with self.engine.hold(layer) as slot:
            weights = self._views[layer, slot]
            try:
                for linear in self.linears[layer]:
                    linear.weight = weights[linear.spec.name]
                yield
            finally:
                for linear in self.linears[layer]:
                    linear.weight = None

    @property
    def traffic(self) -> Traffic:
        """What was copied so far."""
        return self.engine.settled()
