"""Random samples to train on; found by pytest's ``pythonpath``."""

import numpy as np

from effitrain.data.tokenized import TokenSet


def random_samples(count: int, longest: int = 39, vocab: int = 200, seed: int = 0) -> TokenSet:
    """Samples of 5 to ``longest`` tokens, the first third of each not trained."""
    rng = np.random.default_rng(seed)
    samples = [rng.integers(3, vocab, rng.integers(5, longest + 1)) for _ in range(count)]
    ids = np.concatenate(samples).astype(np.int32)
    offsets, labels = np.cumsum([0, *map(len, samples)]), ids.copy()
    for start, sample in zip(offsets, samples, strict=False):
        labels[start : start + max(1, len(sample) // 3)] = -100
    return TokenSet(ids, labels, offsets)
