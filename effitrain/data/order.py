"""Random order as a pure function of counters."""

import numpy as np
from numpy.typing import NDArray


def permutation(seed: int, stream: int, size: int) -> NDArray[np.int64]:
    """A permutation of ``range(size)``: the order of Philox's raw output under the key (seed, stream).

    The raw output, unlike numpy's shuffles, is promised never to change between versions.
    """
    key = np.array([seed, stream], np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(size), kind="stable")
