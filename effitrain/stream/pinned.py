"""Host memory that the card reads and writes by itself."""

import weakref
from contextlib import suppress

import torch
from torch import Tensor


def pinned_empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty host tensor, registered with CUDA in place where ``device`` is a card.

    torch's own pinned memory is rounded up to a power of two. Where the system refuses to pin so much the tensor is
    pageable: copies then are slower and wait for each other, and nothing else changes.
    """
    tensor = torch.empty(shape, dtype=dtype)
    if device.type == "cuda":
        driver, address = torch.cuda.cudart(), tensor.data_ptr()
        if driver.cudaHostRegister(address, tensor.nbytes, 0) == driver.cudaError.success:
            weakref.finalize(tensor.untyped_storage(), driver.cudaHostUnregister, address)
        else:
            with suppress(RuntimeError):  # CUDA keeps the refusal, and reports it as the next kernel's failure
                torch.zeros(1, device=device)
    return tensor
