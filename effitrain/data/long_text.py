"""Running text to tokens in bounded memory: a long text goes through the tokenizer in overlapping windows.

A tokenizer takes some 100 bytes a character while it works, which a book can pay and a corpus in one file cannot: 12.9
million characters took 1.2 GiB in one piece and 0.3 GiB in windows. The ids are those of the whole text: windows are
joined where both found the same tokens.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from effitrain.data.tokenized import Sample, bos_of

WINDOW = 2**18  # characters; shorter texts go to the tokenizer together, up to as many characters
OVERLAP = 1024  # characters that a window holds beyond its borders
AGREED = 8  # tokens in a row, before a joint and after it, that must be the same
GROUP = 4  # windows given to the tokenizer at once, which spreads them over the cores

Tokens = tuple[NDArray[np.int32], NDArray[np.int64]]  # ids, and the character of the text where each begins


def encode_texts(tokenizer: Any, texts: Iterable[str]) -> Iterator[Sample]:
    """Each text as a sample of any length, all of it trained, after one beginning-of-sequence token if there is one."""
    bos = np.asarray(bos_of(tokenizer), np.int32)
    for group in _grouped(texts):
        whole = [_joined(tokenizer, group[0])] if len(group[0]) > WINDOW else _encoded(tokenizer, group)
        for ids in whole:
            ids = ids if np.array_equal(ids[: len(bos)], bos) else np.concatenate([bos, ids])
            yield Sample(ids, np.ones(len(ids), np.bool_))


def _grouped(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts in their order: together up to a window's characters, a longer one by itself."""
    group: list[str] = []
    held = 0
    for text in texts:
        if group and held + len(text) > WINDOW:
            yield group
            group, held = [], 0
        group.append(text)
        held += len(text)
    if group:
        yield group


def _encoded(tokenizer: Any, texts: list[str]) -> list[NDArray[np.int32]]:
    found = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [np.asarray(ids, np.int32) for ids in found]


def _joined(tokenizer: Any, text: str) -> NDArray[np.int32]:
    """The ids of a text that takes several windows."""
    parts: list[NDArray[np.int32]] = []
    before: Tokens | None = None
    for border, window in _windows(tokenizer, text):
        if before is None:
            before = window
            continue
        joint = _joint(before, window, border)
        if joint is None:  # nothing that two windows agree on: a text of one endless word
            return _encoded(tokenizer, [text])[0]
        end, start = joint
        parts.append(before[0][:end])
        before = window[0][start:], window[1][start:]
    assert before is not None
    return np.concatenate([*parts, before[0]])


def _windows(tokenizer: Any, text: str) -> Iterator[tuple[int, Tokens]]:
    """Where each window begins, its margin not counted, and its tokens."""
    every = range(0, len(text) - OVERLAP, WINDOW)  # what is left beyond the last one's end lies in its margin
    for borders in (every[first : first + GROUP] for first in range(0, len(every), GROUP)):
        starts = [max(0, border - OVERLAP) for border in borders]
        pieces = [text[s : b + WINDOW + OVERLAP] for s, b in zip(starts, borders, strict=True)]
        encoded = tokenizer(pieces, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for number, border in enumerate(borders):
            offsets = np.asarray(encoded["offset_mapping"][number], np.int64).reshape(-1, 2)
            yield border, (np.asarray(encoded["input_ids"][number], np.int32), offsets[:, 0] + starts[number])


def _joint(left: Tokens, right: Tokens, border: int) -> tuple[int, int] | None:
    """Where to leave one window and enter the next: at a token that begins at or after ``border`` in both, with the
    same tokens around it. None if there is no such place.
    """
    for place in np.intersect1d(left[1][left[1] >= border], right[1]):
        end, start = (int(np.flatnonzero(starts == place)[0]) for starts in (left[1], right[1]))
        if min(end, start) >= AGREED and _same(left[0][end - AGREED : end + AGREED], right[0][start - AGREED :]):
            return end, start
    return None


def _same(left: NDArray[np.int32], right: NDArray[np.int32]) -> bool:
    return len(left) == 2 * AGREED and np.array_equal(left, right[: 2 * AGREED])
