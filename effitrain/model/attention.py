"""Causal attention over flat rows of samples, registered with transformers under the name ``effitrain``.

A micro-batch is one row of N tokens, several samples end to end. Each sample is a segment and attends to itself alone,
so samples are isolated exactly and there is neither padding nor a mask of N x N.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from inspect import signature
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from effitrain.kernels.shifted_attention import shifted_attention

NAME = "effitrain"


@cache
def register() -> None:
    """Make the attention and its (absent) mask known to transformers; once a process."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    segments: Sequence[int] | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    shifted_group: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each segment.

    Args:
        module: transformers' attention module; unused.
        query: [B, Hq, T, D]; key and value: [B, Hkv, S, D], with S >= T when a cache holds earlier tokens.
        attention_mask: None; segments take its place.
        segments: lengths of the samples along T, when B is 1; None for whole rows.
        scaling: factor on the scores.
        sliding_window: how many last tokens a query sees, when the model limits it.
        shifted_group: tokens of a segment in shifted sparse attention; None for whole samples.

    Returns:
        The output [B, T, Hq, D] and None.
    """
    if shifted_group is not None:

        def attend(query: Tensor, key: Tensor, value: Tensor, within: Sequence[int]) -> Tensor:
            kwargs = {"segments": within, "scaling": scaling, "sliding_window": sliding_window}
            return attention(module, query, key, value, None, **kwargs)[0]  # type: ignore[arg-type]

        lengths = [query.shape[2]] * len(query) if segments is None else segments
        return shifted_attention(query, key, value, lengths, shifted_group, attend), None
    if segments is None or len(segments) == 1:
        return _causal(query, key, value, scaling, sliding_window).transpose(1, 2), None
    if len(set(segments)) > 1 and _has_flash(query) and _varlen() is not None:
        return _varlen_segments(query, key, value, segments, scaling, sliding_window), None
    runs = [_run(q, k, v, length, scaling, sliding_window) for q, k, v, length in _runs(query, key, value, segments)]
    return (runs[0] if len(runs) == 1 else torch.cat(runs, dim=1)), None


def _runs(
    query: Tensor, key: Tensor, value: Tensor, segments: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
    """The parts of a row whose neighbouring segments have one length, and that length."""
    runs = [(length, sum(1 for _ in same)) for length, same in groupby(segments)]
    parts = (tensor.split([length * count for length, count in runs], dim=2) for tensor in (query, key, value))
    for (length, _), q, k, v in zip(runs, *parts, strict=True):
        yield q, k, v, length


def _causal(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """Bottom-right aligned causal attention [B, Hq, T, D]: the last query sees the last key."""
    length, seen = query.shape[2], key.shape[2]
    reach = seen if window is None else min(window, seen)
    mask = None
    if reach < seen or 1 < length < seen:
        behind = torch.arange(seen - length, seen, device=query.device)[:, None] - torch.arange(seen, device=key.device)
        mask = (behind >= 0) & (behind < reach)
    grouped = query.shape[1] != key.shape[1]
    if grouped and query.is_cuda and (mask is not None or not _has_flash(query)):
        # Only flash attention groups heads; the other kernels would fall back to one that holds all T x S scores.
        key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for t in (key, value))
        grouped = False
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None and length > 1,
        scale=scaling,
        enable_gqa=grouped,
    )


def _has_flash(query: Tensor) -> bool:
    """Whether flash attention takes this tensor: half precision on Ampere or later."""
    return query.is_cuda and query.dtype != torch.float32 and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _run(query: Tensor, key: Tensor, value: Tensor, length: int, scaling: float | None, window: int | None) -> Tensor:
    """Segments of one length are a batch: [1, H, n * L, D] as [n, H, L, D]; returns [1, n * L, Hq, D]."""
    q, k, v = (t[0].unflatten(1, (-1, length)).transpose(0, 1) for t in (query, key, value))
    return _causal(q, k, v, scaling, window).transpose(1, 2).flatten(0, 1)[None]


def _varlen_segments(
    query: Tensor, key: Tensor, value: Tensor, segments: Sequence[int], scaling: float | None, window: int | None
) -> Tensor:
    """Flash attention with variable lengths: [1, N, Hq, D]."""
    varlen = _varlen()
    assert varlen is not None
    ends = torch.tensor([0, *segments], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    ends = ends.to(query.device, non_blocking=True)
    q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    longest = max(segments)
    reach = (-1 if window is None or window >= longest else window - 1, 0)
    grouped = {"enable_gqa": True} if "enable_gqa" in signature(varlen).parameters else {}
    out = varlen(q, k, v, ends, ends, longest, longest, scale=scaling, window_size=reach, **grouped)
    return out[None]


@cache
def _varlen() -> Any:
    """torch's variable-length flash attention, where this torch has one that takes windows; before 2.12 it groups heads
    without being asked.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "window_size" in signature(varlen_attn).parameters else None
