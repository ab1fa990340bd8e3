"""Where streamed layers wait: in host memory, pinned where the card allows it, or in the store on disk."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from effitrain.core.layout import Layout
from effitrain.io.blob import Weight, views
from effitrain.stream.pinned import pinned_empty


class LayerSource(Protocol):
    """Gives the bytes of whole layers."""

    def layout(self, layer: int) -> Layout:
        """How the bytes of ``layer`` are laid out."""

    def read_into(self, layer: int, target: Tensor) -> None:
        """Write the bytes of ``layer`` into the host tensor ``target`` [layout.nbytes] uint8."""

    def read_ahead(self, layer: int) -> None:
        """``layer`` will be asked for soon."""


class HostLayers:
    """The layers of ``held`` in host memory, all others still in ``source``.

    Args:
        source: of the bytes.
        held: layers to read into memory now.
        device: that they will visit.
        progress: told every layer that is read.

    Attributes:
        blobs: the layers in memory.
        pageable: those of them that the system refused to pin: each copy takes a detour through a pinned buffer.
    """

    def __init__(
        self,
        source: LayerSource,
        held: tuple[int, ...],
        device: torch.device,
        progress: Callable[[int], None] = lambda layer: None,
    ):
        self.source = source
        self.blobs: dict[int, Tensor] = {}
        for layer in held:
            blob = pinned_empty((source.layout(layer).nbytes,), torch.uint8, device)
            source.read_into(layer, blob)
            self.blobs[layer] = blob
            progress(layer)
        self._versions = {layer: blob._version for layer, blob in self.blobs.items()}
        pageable = [layer for layer, blob in self.blobs.items() if device.type == "cuda" and not blob.is_pinned()]
        self.pageable = frozenset(pageable)
        self._layouts: dict[int, Layout] = {}

    def layout(self, layer: int) -> Layout:
        """How the bytes of ``layer`` are laid out now."""
        return self._layouts.get(layer) or self.source.layout(layer)

    def put(self, layer: int, layout: Layout, blob: Tensor, device: torch.device) -> None:
        """From now on ``layer`` is ``blob`` [layout.nbytes] uint8; whoever has its old bytes in a slot must be told."""
        self.blobs[layer], self._layouts[layer] = blob, layout
        self._versions.pop(layer, None)
        if device.type == "cuda" and not blob.is_pinned():
            self.pageable |= {layer}

    def weights(self, layer: int) -> dict[str, Weight]:
        """The weights of ``layer``, in host memory."""
        layout = self.layout(layer)
        blob = self.blobs.get(layer)
        if blob is None:
            blob = torch.empty(layout.nbytes, dtype=torch.uint8)
            self.source.read_into(layer, blob)
        return views(blob, layout)

    def written(self) -> int:
        """How many layers in memory an operation wrote to since they were read: frozen weights are only ever read. What
        was ``put`` does not count.
        """
        return sum(self.blobs[layer]._version != version for layer, version in self._versions.items())

    def read_ahead(self, layer: int) -> None:
        """``layer`` will be asked for soon: have the system read it when it is on disk."""
        if layer not in self.blobs:
            self.source.read_ahead(layer)
