"""Rendered samples as token ids and labels: one beginning-of-sequence token, spans by offset, cut to length.

A sample's text is tokenised once, as a whole, so that its ids decode to what was rendered. A token is trained when any
of its characters is.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from effitrain.data.marks import Rendered

IGNORE = -100
_CHUNK = 512  # texts given to the tokenizer at once: bounds the memory of their offsets


@dataclass(frozen=True)
class Sample:
    """Token ids, int32 [T], and which of them are trained, bool [T]."""

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]


@dataclass(frozen=True)
class TokenSet:
    """Samples laid end to end.

    Attributes:
        input_ids: int32 [total].
        labels: int32 [total]; the id where it is trained, else -100; not shifted. The first token of a sample is
            never trained: nothing predicts it.
        offsets: int64 [n + 1]; sample i is ``input_ids[offsets[i]:offsets[i + 1]]``.
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sample, int64 [n]."""
        return np.diff(self.offsets)

    @property
    def trained_tokens(self) -> int:
        """How many tokens are trained."""
        return int(np.count_nonzero(self.labels != IGNORE))

    def where(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Indices into ``input_ids`` of the tokens of samples ``rows``, in that order, int64 [their total]."""
        lengths = self.offsets[rows + 1] - self.offsets[rows]
        ends = np.cumsum(lengths)
        return np.arange(ends[-1] if len(ends) else 0) + np.repeat(self.offsets[rows] - (ends - lengths), lengths)

    def subset(self, rows: NDArray[np.int64]) -> "TokenSet":
        """The samples ``rows``, in that order."""
        index = self.where(rows)
        offsets = np.concatenate([[0], np.cumsum(self.lengths[rows])]).astype(np.int64)
        return TokenSet(self.input_ids[index], self.labels[index], offsets)


def join(samples: Sequence[Sample]) -> TokenSet:
    """``samples`` as one set."""
    offsets = np.cumsum([0, *(len(sample.ids) for sample in samples)]).astype(np.int64)
    ids = np.concatenate([np.empty(0, np.int32), *(sample.ids for sample in samples)])
    trained = np.concatenate([np.empty(0, np.bool_), *(sample.trained for sample in samples)])
    labels = np.where(trained, ids, np.int32(IGNORE))
    labels[offsets[:-1]] = IGNORE
    return TokenSet(ids, labels, offsets)


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a rendered text or prompt, with the beginning-of-sequence token exactly once if the tokenizer uses one."""
    return _with_bos(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], bos_of(tokenizer))


def bos_of(tokenizer: Any) -> list[int]:
    """The id that the tokenizer puts before every text, or nothing."""
    return [id for id in tokenizer("")["input_ids"][:1] if id == tokenizer.bos_token_id]


def encode(tokenizer: Any, rendered: Iterable[Rendered]) -> Iterator[Sample]:
    """Each rendered text as a sample of any length; ``tokenizer`` is a fast one."""
    bos, chunk = bos_of(tokenizer), []
    for item in rendered:
        chunk.append(item)
        if len(chunk) == _CHUNK:
            yield from _encode_chunk(tokenizer, chunk, bos)
            chunk = []
    yield from _encode_chunk(tokenizer, chunk, bos)


def _encode_chunk(tokenizer: Any, chunk: list[Rendered], bos: list[int]) -> Iterator[Sample]:
    if not chunk:
        return
    texts = [item.text for item in chunk]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    for item, raw, offsets in zip(chunk, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        ids = _with_bos(raw, bos)
        flat = np.fromiter(chain.from_iterable(offsets), np.int64, 2 * len(offsets))  # a third of asarray's time
        trained = _trained(flat.reshape(-1, 2), item)
        added = np.zeros(len(ids) - len(raw), np.bool_)
        yield Sample(np.asarray(ids, np.int32), np.concatenate([added, trained]))


def _with_bos(ids: list[int], bos: list[int]) -> list[int]:
    return ids if ids[:1] == bos else bos + ids


def _trained(offsets: NDArray[np.int64], item: Rendered) -> NDArray[np.bool_]:
    """Which tokens have a trained character, bool [T].

    Offsets alone would lose tokens: byte-level tokenizers may leave spaces out of them (the indentation of code is then
    zero characters wide), so a token also covers what lies between the end of the one before and its own end.
    """
    edge = np.zeros(len(item.text) + 2, np.int64)
    for start, end in item.trained:
        edge[start + 1 : end + 1] = 1
    before = np.cumsum(edge)  # before[i]: trained characters among the first i
    ends = np.maximum.accumulate(offsets[:, 1])
    starts = np.minimum(offsets[:, 0], np.concatenate([[0], ends[:-1]])) if len(ends) else ends
    return before[ends] > before[starts]


def cut(sample: Sample, max_seq_len: int, truncation: str, bos: Sequence[int]) -> Sample | None:
    """``sample`` in at most ``max_seq_len`` tokens; None if it is dropped, or nothing trained would be left.

    Args:
        truncation: right keeps the first tokens, left the last (and the beginning-of-sequence token), drop neither.
        bos: see ``bos_of``.
    """
    ids, trained = sample.ids, sample.trained
    if len(ids) > max_seq_len:
        if truncation == "drop":
            return None
        head = 0 if truncation == "right" else len(bos)
        tail = slice(head, max_seq_len) if truncation == "right" else slice(len(ids) - max_seq_len + head, None)
        ids = np.concatenate([ids[:head], ids[tail]])
        trained = np.concatenate([trained[:head], trained[tail]])
    return Sample(ids, trained) if trained[1:].any() else None


def pieces(sample: Sample, max_seq_len: int, bos: Sequence[int]) -> Iterator[Sample]:
    """``sample`` cut into rows of ``max_seq_len`` tokens, each with the beginning-of-sequence token.

    A last row of a single token is left out: nothing in it could be trained.
    """
    body, room = sample.ids[len(bos) :], max_seq_len - len(bos)
    for start in range(0, len(body), room):
        ids = np.concatenate([np.asarray(bos, np.int32), body[start : start + room]])
        if len(ids) > 1:
            yield Sample(ids, np.ones(len(ids), np.bool_))
