"""NF4 with double quantisation, in bitsandbytes' layout: quantised by its kernels, read on a card by ours.

A block of 64 weights shares one scale; the scales of 256 blocks, less their mean, are stored in 8 bits. In all
1/2 + 1/64 + 1/4096 bytes a weight (Dettmers et al. 2023, QLoRA, section 3).
"""

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor

from effitrain.io.nf4 import BLOCK, NESTED_BLOCK, NF4Tensor
from effitrain.kernels.backend import usable
from effitrain.kernels.nf4_dequantize import dynamic_code_on, nf4_dequantize

_CHUNK = 2**20  # weights quantised at once: on a CPU bitsandbytes takes temporaries of 20 bytes for each


def quantize(weight: Tensor) -> NF4Tensor:
    """``weight`` [out, in] in NF4 with double quantisation, bit for bit as bitsandbytes does it at once."""
    bnb, flat = _bitsandbytes(), weight.contiguous().view(-1)
    packed = torch.empty((-(-len(flat) // 2), 1), dtype=torch.uint8, device=flat.device)
    scales = torch.empty(-(-len(flat) // BLOCK), dtype=torch.float32, device=flat.device)
    for start in range(0, len(flat), _CHUNK):
        codes, state = bnb.quantize_4bit(flat[start : start + _CHUNK], blocksize=BLOCK, quant_type="nf4")
        packed[start // 2 : start // 2 + len(codes)] = codes
        scales[start // BLOCK : start // BLOCK + len(state.absmax)] = state.absmax
    offset = scales.mean()
    absmax, nested = bnb.quantize_blockwise(scales.sub_(offset), blocksize=NESTED_BLOCK)
    return NF4Tensor(packed, absmax, nested.absmax, offset, tuple(weight.shape))


def dequantize(weight: NF4Tensor, dtype: torch.dtype) -> Tensor:
    """The weights [out, in] that ``weight`` stands for, in ``dtype``.

    bitsandbytes' CPU kernel starts a new block at each row, though blocks run on across rows: it is told of one row.
    """
    if usable("nf4_dequantize", weight.nested_absmax):
        return nf4_dequantize(weight, dtype)
    _bitsandbytes()
    code = dynamic_code_on(weight.packed.device)
    absmax = torch.ops.bitsandbytes.dequantize_blockwise(
        weight.absmax, weight.nested_absmax, code, weight.nested_blocksize, torch.float32
    )
    absmax += weight.offset
    flat = [torch.Size(weight.shape).numel()]
    return torch.ops.bitsandbytes.dequantize_4bit(weight.packed, absmax, weight.blocksize, "nf4", flat, dtype).view(
        weight.shape
    )


def warm_up(device: torch.device) -> None:
    """Load what is loaded once a process, real tensors among it, before steps are run on shapes alone."""
    _bitsandbytes()
    dynamic_code_on(device)


@cache
def _bitsandbytes() -> Any:
    """bitsandbytes' functions; its import takes seconds and logs an error about kernels this project does not use."""
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    import bitsandbytes.functional

    return bitsandbytes.functional
