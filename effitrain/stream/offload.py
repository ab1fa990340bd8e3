"""Layer inputs in host memory between the forward and the backward pass, through buffers that are made once.

On CUDA copies run on a stream of their own beside the computation, from and to pinned memory; on a CPU the same steps
are plain copies. Shapes: x [1, N, H], N tokens of a micro-batch, at most ``tokens``.
"""

import torch
from torch import Tensor

from effitrain.stream.pinned import pinned_empty


class Offload:
    """A stack of layer inputs: put in the order of the forward pass, taken in the reverse order.

    Two staging buffers on the device hold the input in use and the one before it, which is fetched meanwhile. What
    ``take`` gives is valid until the second ``take`` after it.

    Args:
        layers: how many inputs there are at most.
        tokens: of the largest micro-batch.
        hidden: size of the hidden states.
        dtype: of the hidden states.
        device: where they are computed.
    """

    def __init__(self, layers: int, tokens: int, hidden: int, dtype: torch.dtype, device: torch.device):
        self.host = pinned_empty((layers, tokens * hidden), dtype, device)
        self.staging = torch.empty((2, tokens * hidden), dtype=dtype, device=device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:  # after a step that broke off, a copy may still be under way
            self.staging.record_stream(self._stream)
        self._shapes: list[torch.Size] = []
        self._leaving: Tensor | None = None  # being copied to the host: its memory must not be given away yet
        self._staged: dict[int, torch.cuda.Event | None] = {}

    def reset(self) -> None:
        """Forget everything: a forward pass begins."""
        self._release()
        self._shapes.clear()
        self._staged.clear()

    def put(self, x: Tensor) -> int:
        """Begin to copy ``x`` to the host; the ticket takes it back.

        Raises:
            IndexError: there are ``layers`` inputs already.
        """
        self._release()
        ticket, flat = len(self._shapes), x.detach().reshape(-1)  # of its own where x is not contiguous
        self._copy(self.host[ticket, : x.numel()], flat)
        self._shapes.append(x.shape)
        self._leaving = flat
        return ticket

    def take(self, ticket: int) -> Tensor:
        """The input of ``ticket`` on the device; the one before it is on its way when this returns."""
        self._release()
        if ticket not in self._staged:
            self._fetch(ticket)
        event = self._staged.pop(ticket)
        if event is not None:
            torch.cuda.current_stream().wait_event(event)
        if ticket:
            self._fetch(ticket - 1)
        shape = self._shapes[ticket]
        return self.staging[ticket % 2, : shape.numel()].view(shape)

    def _fetch(self, ticket: int) -> None:
        count = self._shapes[ticket].numel()
        self._staged[ticket] = self._copy(self.staging[ticket % 2, :count], self.host[ticket, :count])

    def _copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event | None:
        """Copy after all that was asked of the device so far, beside what will be."""
        if self._stream is None:
            target.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def _release(self) -> None:
        """Let go of the tensor last put, when its copy is done."""
        if self._leaving is not None and self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        self._leaving = None
