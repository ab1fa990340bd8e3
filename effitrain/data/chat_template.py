"""The chat template that a tokenizer brings, and where the answers lie in what it renders."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from effitrain.core.errors import InputError
from effitrain.data.formats import Turn
from effitrain.data.marks import Marks, Rendered

_ROLES = {"prompt": "user", "completion": "assistant"}
_INSTEAD = "Remove or change those turns, or use --template plain or --template chatml."


@dataclass(frozen=True)
class ChatTemplate:
    """The jinja chat template of ``tokenizer``.

    An answer's span runs from the end of its prompt (the turns before it, with the generation prompt) to the end of
    the conversation rendered up to it, end-of-turn mark included.
    """

    tokenizer: Any
    marks: Marks
    name: str = "tokenizer"

    def render(self, turns: Sequence[Turn], where: str) -> list[Rendered]:
        """One sample; or one for each answer, where the template writes earlier answers differently from the last.

        Args:
            turns: the last one is an answer.
            where: the row, for messages.

        Raises:
            InputError: the template refuses a role or the order of roles, or leaves out what is said.
        """
        messages = [_message(turn) for turn in turns]
        ends = [number for number, turn in enumerate(turns, 1) if turn.trained]
        answers = [self._answer(messages[:end], where) for end in ends]
        whole = answers[-1].text
        spans = [self._span_in(whole, answer, messages[end - 1]) for end, answer in zip(ends, answers, strict=True)]
        if None in spans:
            return [self.marks.closed(answer) for answer in answers]
        return [self.marks.closed(Rendered(whole, tuple(span for span in spans if span)))]

    def prompt(self, turns: Sequence[Turn]) -> str:
        """The turns, then the template's generation prompt."""
        return self._text([_message(turn) for turn in turns], "The prompt", generation=True)

    def _answer(self, messages: list[dict[str, str]], where: str) -> Rendered:
        """The conversation up to an answer, the last of ``messages``, with that answer alone as trained span."""
        text = self._text(messages, where)
        _check_kept(messages, text, where)
        if len(messages) == 1:
            return Rendered(text, ((max(0, text.find(messages[0]["content"].strip())), len(text)),))
        prompt = self._text(messages[:-1], where, generation=True)
        if not text.startswith(prompt):  # some generation prompts open a block of thoughts that the answer may lack
            prompt = _shared(prompt, text)
            if messages[-2]["content"].strip() not in prompt:
                raise InputError(
                    f"{where}: the tokenizer's chat template does not write the turns one after the other, "
                    "so the answer cannot be told from its prompt.",
                    next_step=_INSTEAD,
                )
        return Rendered(text, ((len(prompt), len(text)),))

    def _span_in(self, whole: str, answer: Rendered, message: dict[str, str]) -> tuple[int, int] | None:
        """Where ``answer`` lies in the whole conversation; None if that writes it differently, or without its end."""
        start, end = answer.trained[0]
        if whole.startswith(answer.text):
            return start, end
        shared = len(_shared(whole, answer.text))
        content = message["content"].strip()
        said = answer.text.find(content, start) + len(content)
        ends = [whole.find(mark, said) + len(mark) for mark in self.marks.special if mark in whole[said:shared]]
        return (start, max(ends)) if ends and said >= start + len(content) else None

    def _text(self, messages: list[dict[str, str]], where: str, generation: bool = False) -> str:
        import jinja2

        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise InputError(
                f"{where}: the tokenizer's chat template refuses turns of {roles}: {error}", next_step=_INSTEAD
            ) from None


def _message(turn: Turn) -> dict[str, str]:
    text = f"{turn.text}\n\n{turn.input}" if turn.input else turn.text
    return {"role": _ROLES.get(turn.role, turn.role), "content": text}


def _check_kept(messages: list[dict[str, str]], text: str, where: str) -> None:
    """Refuse a rendering that lost the last answer or what others say before it; white space may change.

    Some templates write what a tool says as JSON.
    """
    squeezed = _squeezed(text)
    for message in [*(m for m in messages if m["role"] != "assistant"), messages[-1]]:
        forms = message["content"], json.dumps(message["content"], ensure_ascii=False)
        if not any(_squeezed(form) in squeezed for form in forms):
            raise InputError(
                f"{where}: the tokenizer's chat template leaves out or changes what the {message['role']} says.",
                next_step=_INSTEAD,
            )


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _shared(first: str, second: str) -> str:
    """What both begin with."""
    same = (a == b for a, b in zip(first, second, strict=False))
    return first[: next((i for i, equal in enumerate(same) if not equal), min(len(first), len(second)))]
