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
    """A loaded model, with or without an adapter, its tokenizer and the template of its turns.

    ``length``: tokens that a conversation may have, None for all that the model takes; ``at_once``: conversations that
    are answered together.
    """

    decoder: Decoder
    tokenizer: Any
    template: str = "auto"
    seed: int = 42
    length: int | None = None
    at_once: int = 16

    def answer(
        self, messages: Sequence[dict[str, str]], max_new_tokens: int = 200, temperature: float = 0.0
    ) -> Iterator[str]:
        """The answer to ``[{"role", "content"}, ...]`` in pieces of text, as they are made.

        Raises:
            InputError: the conversation leaves no room for an answer.
        """
        ids, stop = self._tokens(messages), self._stop()
        made: list[int] = []
        shown = ""
        for token in generate(self.decoder, ids, max_new_tokens, stop, temperature, self.seed, self.length):
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
            InputError: a conversation leaves no room for an answer.
        """
        prompts, stop = [self._tokens(messages) for messages in conversations], self._stop()
        made: list[list[int]] = []
        for first in range(0, len(prompts), self.at_once):
            group = prompts[first : first + self.at_once]
            made += generate_all(self.decoder, group, max_new_tokens, stop, temperature, self.seed, self.length)
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in made]

    def _stop(self) -> set[int]:
        return stop_ids(find_template(self.template, self.tokenizer), self.tokenizer)

    def _tokens(self, messages: Sequence[dict[str, str]]) -> list[int]:
        turns = [Turn(message["role"], message["content"]) for message in messages]
        ids = token_ids(self.tokenizer, find_template(self.template, self.tokenizer).prompt(turns))
        most = self.decoder.spec.max_positions
        length = most if self.length is None else self.length
        if len(ids) >= length:
            longer = f", or plan for longer ones: --max-seq-len, up to {most}" if length < most else ""
            raise InputError(
                f"The conversation has {len(ids)} tokens, and {length} is the most with its answer.",
                next_step=f"Begin a new one{longer}.",
            )
        return ids
