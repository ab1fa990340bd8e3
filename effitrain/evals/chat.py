"""Talk to a loaded model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from effitrain.core.errors import InputError
from effitrain.data.formats import Turn
from effitrain.data.templates import find_template, stop_ids
from effitrain.data.tokenized import token_ids
from effitrain.evals.generate import generate
from effitrain.model.decoder import Decoder


@dataclass(frozen=True)
class ChatSession:
    """A loaded model, with or without an adapter, its tokenizer and the template of its turns."""

    decoder: Decoder
    tokenizer: Any
    template: str = "auto"
    seed: int = 42

    def answer(
        self, messages: Sequence[dict[str, str]], max_new_tokens: int = 200, temperature: float = 0.0
    ) -> Iterator[str]:
        """The answer to ``[{"role", "content"}, ...]`` in pieces of text, as they are made.

        Raises:
            InputError: the conversation fills the model's length.
        """
        template = find_template(self.template, self.tokenizer)
        turns = [Turn(message["role"], message["content"]) for message in messages]
        ids = token_ids(self.tokenizer, template.prompt(turns))
        stop = stop_ids(template, self.tokenizer)
        if len(ids) >= self.decoder.spec.max_positions:
            raise InputError(
                f"The conversation has {len(ids)} tokens and the model takes {self.decoder.spec.max_positions}.",
                next_step="Begin a new one.",
            )
        made: list[int] = []
        shown = ""
        for token in generate(self.decoder, ids, max_new_tokens, stop, temperature, self.seed):
            made.append(token)
            text = self.tokenizer.decode(made, skip_special_tokens=True)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # the middle of a character: wait for its rest
                yield text[len(shown) :]
                shown = text
