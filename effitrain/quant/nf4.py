"""NF4 with double quantisation, in bitsandbytes' layout: quantised by its kernels, read on a card by ours.

A block of 64 weights shares one scale; the scales of 256 blocks, less their mean, are stored in 8 bits. In all
1/2 + 1/64 + 1/4096 bytes a weight (Dettmers et al. 2023, QLoRA, section 3).
"""

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor

from effitrain.io.nf4 import NF4Tensor
from effitrain.kernels.backend import usable
from effitrain.kernels.nf4_dequantize import dynamic_code_on, nf4_dequantize


def quantize(weight: Tensor) -> NF4Tensor:
    """``weight`` [out, in] in NF4 with double quantisation."""
    packed, state = _bitsandbytes().quantize_4bit(
        weight.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    return NF4Tensor(
        packed=packed,
        absmax=state.absmax,
        nested_absmax=state.state2.absmax,
        offset=state.offset,
        shape=tuple(weight.shape),
    )


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
