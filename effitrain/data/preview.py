"""One sample as a person would read it, with the trained part marked."""

from typing import Any

import numpy as np

from effitrain.data.tokenized import IGNORE, TokenSet

_LOOKED_AT = 20  # samples among which the shortest is shown
_LONGEST_RUN = 600  # characters of a trained or untrained part that are shown


def preview(tokens: TokenSet, tokenizer: Any) -> str:
    """A short sample of ``tokens`` decoded, trained parts between « and », long parts shortened in their middle."""
    row = int(np.argmin(tokens.lengths[:_LOOKED_AT]))
    part = slice(tokens.offsets[row], tokens.offsets[row + 1])
    ids, trained = tokens.input_ids[part].tolist(), tokens.labels[part] != IGNORE
    edges = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(ids)]
    ends = [len(tokenizer.decode(ids[:edge])) if edge else 0 for edge in edges]
    text = tokenizer.decode(ids)
    runs = [(text[a:b], trained[edge]) for a, b, edge in zip(ends, ends[1:], edges, strict=False)]
    return "".join(f"«{_shortened(run)}»" if is_trained else _shortened(run) for run, is_trained in runs)


def _shortened(text: str) -> str:
    half = _LONGEST_RUN // 2
    return text if len(text) <= _LONGEST_RUN else f"{text[:half]} […] {text[-half:]}"
