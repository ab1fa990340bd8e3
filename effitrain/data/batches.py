"""Micro-batches: whole samples laid end to end without padding, in an order that depends on seed and epoch alone."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from effitrain.data.order import permutation
from effitrain.data.packing import first_fit_decreasing
from effitrain.data.tokenized import IGNORE, TokenSet


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one forward pass, laid end to end; N is their total length.

    Attributes:
        input_ids: int64 [N].
        labels: int64 [N], shifted: ``labels[i]`` is what token i should predict, -100 where nothing is trained and at
            the last token of every segment.
        position_ids: int64 [N], from 0 in every segment.
        segments: length of each sample; samples must not see each other.
        trained_rows: int64 [K], where ``labels`` is not -100.
        samples: how many samples there are.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    segments: tuple[int, ...]
    trained_rows: Tensor
    samples: int

    @property
    def trained_tokens(self) -> int:
        """How many tokens are to be predicted."""
        return len(self.trained_rows)


class Batches:
    """The micro-batches of a token set: ``get(index)`` is a pure function of the index, over all epochs.

    Args:
        token_set: the samples, none longer than ``max_seq_len``.
        batch_size: rows of a micro-batch; the last one of an epoch may have fewer.
        max_seq_len: tokens of a row.
        packing: a row is a bin filled by first-fit decreasing, instead of one sample.
        seed: of the order of rows, which differs from epoch to epoch.
    """

    def __init__(self, token_set: TokenSet, batch_size: int, max_seq_len: int, packing: bool, seed: int):
        self.token_set, self.batch_size, self.seed = token_set, batch_size, seed
        samples = np.arange(len(token_set))
        bins = first_fit_decreasing(token_set.lengths, max_seq_len) if packing and len(token_set) else samples[:, None]
        self.rows: list[NDArray[np.int64]] = list(bins)
        self.per_epoch = -(-len(self.rows) // batch_size)
        self._epoch, self._order = -1, samples

    def get(self, index: int) -> MicroBatch:
        """Micro-batch ``index``, counted from the first epoch on; epoch ``index // per_epoch``.

        Raises:
            IndexError: below zero, or the set is empty.
        """
        if index < 0 or not self.per_epoch:
            raise IndexError(f"no micro-batch {index} in {self.per_epoch} an epoch")
        epoch, step = divmod(index, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(self.seed, epoch, len(self.rows))
        chosen = self._order[step * self.batch_size : (step + 1) * self.batch_size]
        return self.gather(np.concatenate([self.rows[row] for row in chosen]))

    def gather(self, samples: NDArray[np.int64]) -> MicroBatch:
        """The micro-batch of these samples, given by index into the token set."""
        where = self.token_set.where(samples)
        lengths = self.token_set.offsets[samples + 1] - self.token_set.offsets[samples]
        ends = np.cumsum(lengths)
        labels = np.append(self.token_set.labels[where[1:]], IGNORE)
        labels[ends - 1] = IGNORE
        positions = np.arange(len(where)) - np.repeat(ends - lengths, lengths)
        return MicroBatch(
            torch.from_numpy(self.token_set.input_ids[where].astype(np.int64)),
            torch.from_numpy(labels.astype(np.int64)),
            torch.from_numpy(positions.astype(np.int64)),
            tuple(lengths.tolist()),
            torch.from_numpy(np.flatnonzero(labels != IGNORE)),
            len(samples),
        )

    @cached_property
    def longest(self) -> MicroBatch:
        """The longest ``batch_size`` rows together, for the probe: no micro-batch of any epoch has more tokens.

        Raises:
            ValueError: the set is empty.
        """
        if not self.rows:
            raise ValueError("the set is empty")
        chosen = np.argsort(-self._by_row(self.token_set.lengths), kind="stable")[: self.batch_size]
        return self.gather(np.concatenate([self.rows[row] for row in chosen]))

    @property
    def most_trained(self) -> int:
        """Trained tokens of the ``batch_size`` rows that have the most: no micro-batch of any epoch has more."""
        tokens = self.token_set
        ends = np.append(0, np.cumsum(tokens.labels != IGNORE))[tokens.offsets]
        return int(np.sort(self._by_row(np.diff(ends)))[-self.batch_size :].sum())

    def _by_row(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """``counts`` of samples, summed up by row."""
        return np.array([counts[row].sum() for row in self.rows])
