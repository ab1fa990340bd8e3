"""Talk to a loaded model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from effitrain.core.errors import InputError
from effitrain.data.formats import Turn
from effitrain.data.templates import find_template, stop_ids
from effitrain.data.tokenized import token_ids
from effitrain.evals.generate import generate, generate_all
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
        ids, stop = self._tokens(messages), self._stop()
        made: list[int] = []
        shown = ""
        for token in generate(self.decoder, ids, max_new_tokens, stop, temperature, self.seed):
            made.append(token)
            text = self.tokenizer.decode(made, skip_special_tokens=True)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # the middle of a character: wait for its rest
                yield text[len(shown) :]
                shown = text

    def answers(
        self, conversations: Sequence[Sequence[dict[str, str]]], max_new_tokens: int = 200, temperature: float = 0.0
    ) -> list[str]:
        """The answers to several conversations, made together: where layers stream they are copied once for all.

        Raises:
            InputError: a conversation fills the model's length.
        """
        prompts, stop = [self._tokens(messages) for messages in conversations], self._stop()
        made = generate_all(self.decoder, prompts, max_new_tokens, stop, temperature, self.seed)
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in made]

    def _stop(self) -> set[int]:
        return stop_ids(find_template(self.template, self.tokenizer), self.tokenizer)

    def _tokens(self, messages: Sequence[dict[str, str]]) -> list[int]:
        turns = [Turn(message["role"], message["content"]) for message in messages]
        ids = token_ids(self.tokenizer, find_template(self.template, self.tokenizer).prompt(turns))
        if len(ids) >= self.decoder.spec.max_positions:
            raise InputError(
                f"The conversation has {len(ids)} tokens and the model takes {self.decoder.spec.max_positions}.",
                next_step="Begin a new one.",
            )
        return ids
