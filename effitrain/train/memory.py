"""Bytes of live tensors and their peak: the allocator's own count on CUDA, tracked storages on a CPU."""

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from effitrain.core.budget import CUDA_SLACK_BYTES, MemoryBudget
from effitrain.core.errors import InputError
from effitrain.io.machine import card, process_device_bytes
from effitrain.io.nf4 import NF4Tensor


class StorageTracker(TorchDispatchMode):
    """Counts every storage that an operation returns while it lives, and those it is told of.

    Attributes:
        live: bytes now.
        peak: most bytes so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def ignore(self, *tensors: Tensor) -> None:
        """Do not count these: what lies in host memory."""
        for storage in _storages(tensors):
            self._sizes[storage._cdata] = 0

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were made before tracking began."""
        for storage in _storages(tensors):
            key = storage._cdata
            if key not in self._sizes:
                self._sizes[key] = storage.nbytes()
                self.live += storage.nbytes()
                weakref.finalize(storage, self._forget, key)
        self.peak = max(self.peak, self.live)

    def restart(self) -> int:
        """The peak so far; the next one starts from what is alive now."""
        peak, self.peak = self.peak, self.live
        return peak

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.add(leaf for leaf in tree_iter(out) if isinstance(leaf, Tensor))
        return out


def _storages(tensors: Iterable[Tensor]) -> Iterator[torch.UntypedStorage]:
    """Where the numbers of the tensors are; of a sparse one those of its parts."""
    for tensor in tensors:
        if tensor.is_sparse:
            yield from (part.untyped_storage() for part in (tensor._indices(), tensor._values()))
        else:
            yield tensor.untyped_storage()


def model_tensors(model: torch.nn.Module) -> list[Tensor]:
    """Every tensor a model holds: parameters, buffers, and the frozen weights that are plain attributes."""
    found: list[Tensor] = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        for value in vars(module).values():
            parts = vars(value).values() if isinstance(value, NF4Tensor) else (value,)
            found += [part for part in parts if isinstance(part, Tensor)]
    return found


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The states of an optimizer."""
    return [leaf for leaf in tree_iter(dict(optimizer.state)) if isinstance(leaf, Tensor)]


class Meter:
    """Peak device bytes of the process, whatever the device, since the meter was made.

    On CUDA that is what the allocator reserved plus what lies outside it. On a CPU it is the tracked peak of the probe
    step, the largest step of the run: tracking every step would slow it down.

    Args:
        device: where training takes place.
        context_bytes: on CUDA, the bytes outside the allocator; None measures them at the first ``peak()``, which
            should follow a whole step: the driver loads a kernel when it first runs.
    """

    def __init__(self, device: torch.device, context_bytes: int | None = None):
        self.device, self.context_bytes = device, context_bytes
        self.tracker = StorageTracker()
        if device.type == "cuda":
            torch.cuda.init()
            torch.cuda.empty_cache()  # the peak starts from what is reserved, so blocks of an earlier run must go
            torch.cuda.reset_peak_memory_stats(device)

    def peak(self) -> int:
        """Most bytes so far."""
        if self.device.type != "cuda":
            return self.tracker.peak
        if self.context_bytes is None:
            self.context_bytes = cuda_context_bytes()
        return torch.cuda.max_memory_reserved(self.device) + self.context_bytes


def cuda_context_bytes() -> int:
    """Bytes of this process on the card outside torch's allocator: context, loaded kernels, buffers of libraries.

    It grows as kernels run for the first time. The driver's count for the process is taken; where it gives none, what
    the card lost of its free memory since ``card()`` first asked, other programs' shares included.
    """
    free, total = torch.cuda.mem_get_info()  # makes the context, if there is none yet
    reserved = torch.cuda.memory_reserved()
    held = process_device_bytes()
    if held is None or held < reserved:  # less than we know of: a process of another container with the same number
        found = card()
        held = (found.free if found else total) - free
    return max(held - reserved, 0)


def measured(budget: MemoryBudget) -> MemoryBudget:
    """``budget`` with the context that this process has on the card here, in place of the stated default."""
    if budget.device != "cuda" or not torch.cuda.is_available():
        return budget
    return replace(budget, overhead_bytes=cuda_context_bytes() + CUDA_SLACK_BYTES)


def device_of(budget: MemoryBudget) -> torch.device:
    """Where to compute.

    Raises:
        InputError: there is a card, and this torch cannot use it.
    """
    if budget.device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"There is a CUDA card, and torch {torch.__version__} cannot use it.",
            "It is a build for the CPU, or the driver is too old for it.",
            "Install the CUDA build of torch, or hide the card with CUDA_VISIBLE_DEVICES= to run on the CPU.",
        )
    return torch.device(budget.device)


def device_allocations(device: torch.device) -> int | None:
    """How often the device was asked for memory, which ruins overlap; None on a CPU, where nobody counts."""
    return torch.cuda.memory_stats(device)["num_device_alloc"] if device.type == "cuda" else None


def cap_memory(budget_bytes: int, context_bytes: int) -> None:
    """Make torch's allocator raise OutOfMemoryError rather than take more of the card than a budget leaves it.

    Args:
        budget_bytes: for the whole process.
        context_bytes: of that, what lies outside the allocator.
    """
    _, total = torch.cuda.mem_get_info()
    share = max(budget_bytes - context_bytes, 0) / total
    torch.cuda.set_per_process_memory_fraction(min(share, 1.0))
