"""Conversations as text: the named templates, and the choice of a template.

A named template writes every turn as prefix, text, suffix. The trained span of an answer is its text and its suffix,
so the end-of-turn mark is always learnt. ``plain`` is the layout of Alpaca:

    ### Instruction:
    {instruction}

    ### Input:
    {input}

    ### Response:
    {output}</s>

A prompt with its completion has no headings in ``plain``: the prompt, a line end unless there is white space already,
the completion, the end-of-sequence token. In the other templates they are a user's and an assistant's turn.

``none`` adds that token alone, and an empty line before Alpaca's input: for rows that bring their own marks, and to let
a model of running text go on from a prompt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from effitrain.core.errors import InputError
from effitrain.data.chat_template import ChatTemplate
from effitrain.data.formats import Turn
from effitrain.data.marks import Marks, Rendered, marks_of

_EOS = "{eos}"


@dataclass(frozen=True)
class Style:
    """Prefix and suffix of the turns of every role, and what stands between an alpaca instruction and its input."""

    turns: Mapping[str, tuple[str, str]]
    input_heading: str = "\n\n"


def _chat(prefix: str, suffix: str, tool: str = "tool") -> Style:
    """A style with the same marks for every role; ``{}`` in ``prefix`` is the role's name."""
    roles = {"system": "system", "user": "user", "prompt": "user", "tool": tool}
    answers = {"assistant": "assistant", "completion": "assistant"}
    return Style({role: (prefix.format(name), suffix) for role, name in (roles | answers).items()})


STYLES = {
    "plain": Style(
        {
            "system": ("", "\n\n"),
            "user": ("### Instruction:\n", "\n\n"),
            "tool": ("### Tool:\n", "\n\n"),
            "assistant": ("### Response:\n", _EOS),
            "prompt": ("", ""),
            "completion": ("\n", _EOS),
        },
        input_heading="\n\n### Input:\n",
    ),
    "chatml": _chat("<|im_start|>{}\n", "<|im_end|>\n"),
    "llama3": _chat("<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>", tool="ipython"),
    "none": Style(
        {
            "assistant": ("", _EOS),
            "completion": ("", _EOS),
            **dict.fromkeys(("system", "user", "tool", "prompt"), ("", "")),
        }
    ),
}


class Template(Protocol):
    """Turns conversations into text."""

    @property
    def name(self) -> str:
        """As printed and reported."""
        ...

    def render(self, turns: Sequence[Turn], where: str) -> list[Rendered]:
        """A conversation that ends in an answer, as one or several samples; ``where`` names its row in errors."""
        ...

    def prompt(self, turns: Sequence[Turn]) -> str:
        """A conversation up to the point where the model is to answer."""
        ...


@dataclass(frozen=True)
class NamedTemplate:
    """A template of ``STYLES`` with the marks of one tokenizer."""

    name: str
    style: Style
    marks: Marks

    def render(self, turns: Sequence[Turn], where: str) -> list[Rendered]:
        """Always one sample."""
        text, trained = self._written(turns)
        return [self.marks.closed(Rendered(text, trained))]

    def prompt(self, turns: Sequence[Turn]) -> str:
        """The turns, then the opening of the answer."""
        text, _ = self._written(turns)
        return self._opened(text, "completion" if turns and turns[-1].role == "prompt" else "assistant", "")

    def _written(self, turns: Sequence[Turn]) -> tuple[str, tuple[tuple[int, int], ...]]:
        text, trained = "", []
        for turn in turns:
            text = self._opened(text, turn.role, turn.text)
            start = len(text)
            text += turn.text + (self.style.input_heading + turn.input if turn.input else "")
            text += self.style.turns[turn.role][1].replace(_EOS, self.marks.eos)
            if turn.trained:
                trained.append((start, len(text)))
        return text, tuple(trained)

    def _opened(self, text: str, role: str, said: str) -> str:
        """``text`` and the prefix of ``role``; a prefix of white space only where there is none."""
        prefix = self.style.turns[role][0]
        return text if prefix.isspace() and (text[-1:].isspace() or said[:1].isspace()) else text + prefix


def check_template(name: str) -> None:
    """Raise InputError when there is no template of this name."""
    if name not in ("auto", *STYLES):
        raise InputError(f"There is no template {name!r}.", next_step=f"Use --template auto, {', '.join(STYLES)}.")


def find_template(name: str, tokenizer: Any) -> Template:
    """The template called ``name``; auto is the tokenizer's own chat template if it has one, else plain.

    Raises:
        InputError: no such template, or the tokenizer has no end-of-sequence token.
    """
    check_template(name)
    if name == "auto" and tokenizer.chat_template:
        return ChatTemplate(tokenizer, marks_of(tokenizer))
    name = "plain" if name == "auto" else name
    return NamedTemplate(name, STYLES[name], marks_of(tokenizer))


def stop_ids(template: Template, tokenizer: Any) -> set[int]:
    """Ids that end an answer: the end of sequence, and the special tokens that ``template`` writes after an answer."""
    sample = template.render([Turn("user", "question"), Turn("assistant", "answer")], "The probe")[0]
    after = tokenizer(sample.text[sample.text.rindex("answer") + len("answer") :], add_special_tokens=False)[
        "input_ids"
    ]
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {tokenizer.eos_token_id} | (special & set(after))
