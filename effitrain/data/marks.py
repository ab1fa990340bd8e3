"""What rendering gives: a sample's text with its trained spans, closed by an end mark that the tokenizer knows."""

from dataclasses import dataclass
from typing import Any

from effitrain.core.errors import InputError


@dataclass(frozen=True)
class Rendered:
    """A sample as text; ``trained`` are (start, end) character spans, in order."""

    text: str
    trained: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Marks:
    """The end of sequence of a tokenizer, and all its special tokens."""

    eos: str
    special: tuple[str, ...]

    def closed(self, sample: Rendered) -> Rendered:
        """``sample`` with the end of sequence after its last answer, unless a special token ends it already."""
        if sample.text.rstrip().endswith(self.special) or not sample.trained:
            return sample
        text = sample.text + self.eos
        return Rendered(text, (*sample.trained[:-1], (sample.trained[-1][0], len(text))))


def marks_of(tokenizer: Any) -> Marks:
    """The marks of ``tokenizer``.

    Raises:
        InputError: it has no end-of-sequence token, so no answer could end.
    """
    if not tokenizer.eos_token:
        raise InputError(
            "The tokenizer has no end-of-sequence token, so the model could not learn where an answer ends.",
            next_step="Set eos_token in its tokenizer_config.json.",
        )
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return Marks(tokenizer.eos_token, tuple({tokenizer.eos_token, *added}))
