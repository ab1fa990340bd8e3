"""Shifted sparse attention of LongLoRA (Chen et al. 2023), by segments and without its leak into the future.

Formula: the first half of the query heads attend causally within [0, G), [G, 2G), ... of each sample, the second half
within [0, G/2), [G/2, 3G/2), ...; a sample of at most G tokens attends to itself whole in all heads. Nothing is rolled:
in the rolled form the first G/2 tokens of half the heads see the last G/2.

Shapes: query [B, Hq, T, D], key and value [B, Hkv, T, D], out [B, T, Hq, D]; B is 1 where a row holds several samples.
This is thin: which tokens see each other is a matter of the segments alone, and attention within segments is flash
attention with variable lengths where torch has it. It saves what that saves. For training; at inference attention is
whole.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

Attend = Callable[[Tensor, Tensor, Tensor, Sequence[int]], Tensor]


def segments_of(lengths: Sequence[int], group: int, shifted: bool) -> list[int]:
    """The lengths of the segments that samples of ``lengths`` are cut into, in order."""
    cut = []
    for length in lengths:
        first = group // 2 if shifted and length > group else group
        starts = [0, *range(first, length, group), length]
        cut += [end - start for start, end in pairwise(starts)]
    return cut


def head_parts(heads: int, kv_heads: int) -> Iterator[tuple[slice, slice, bool]]:
    """Query heads, the key heads they share evenly, and whether they are shifted; at most two parts a half.

    With an odd number of key heads, as pruning can leave, the middle one serves query heads of both halves.
    """
    size, half = heads // kv_heads, heads // 2
    bounds = sorted({0, half // size * size, half, -(-half // size) * size, heads})
    for start, end in pairwise(bounds):
        yield slice(start, end), slice(start // size, -(-end // size)), start >= half


def reference(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], group: int) -> Tensor:
    """The formula with a mask of [Hq, T, T]."""
    heads = query.shape[1]
    key, value = (t.repeat_interleave(heads // t.shape[1], 1) for t in (key, value))
    seen = []
    for shifted in (False, True):
        parts = torch.tensor(segments_of(lengths, group, shifted))
        member = torch.arange(len(parts)).repeat_interleave(parts)
        seen.append((member[:, None] == member[None, :]).tril())
    half = heads // 2
    mask = torch.stack([seen[0]] * half + [seen[1]] * (heads - half)).to(query.device)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def shifted_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], group: int, attend: Attend
) -> Tensor:
    """Attention [B, T, Hq, D] within the segments of each half of the heads.

    Args:
        query: [B, Hq, T, D].
        key: [B, Hkv, T, D].
        value: as ``key``.
        lengths: of the samples along T; T for each row where B is more than 1.
        group: G, tokens of a segment; even.
        attend: causal attention within segments of the given lengths, from tensors as these to [B, T, heads, D].
    """
    rows = len(query)
    if rows > 1:  # laid end to end they are samples of one row
        query, key, value = (t.transpose(0, 1).flatten(1, 2)[None] for t in (query, key, value))
    outputs = [
        attend(query[:, heads], key[:, shared], value[:, shared], segments_of(lengths, group, shifted))
        for heads, shared, shifted in head_parts(query.shape[1], key.shape[1])
    ]
    out = torch.cat(outputs, 2)
    return out.view(rows, -1, *out.shape[2:])
