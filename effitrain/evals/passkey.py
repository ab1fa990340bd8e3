"""Passkey retrieval (Mohtashami and Jaggi 2023): a number hidden in filler text, asked for at the end.

Whether a model finds it, by length of the prompt and by depth, says how much of its context it can use.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from effitrain.core.errors import InputError
from effitrain.core.spec import ModelSpec
from effitrain.data.tokenized import token_ids
from effitrain.evals.generate import generate_all
from effitrain.model.decoder import Decoder

TASK = "There is a pass key hidden in a lot of irrelevant text. Find it and remember it. I will ask you about it.\n"
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
HIDDEN = "The pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "What is the pass key? The pass key is"
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # shares of the filler before the key
TRIALS = 5  # keys at each depth
ANSWER_TOKENS = 12  # room for five digits, one by one, and what may stand before them


@dataclass(frozen=True)
class Found:
    """How often the key was found in prompts of ``length`` tokens, the answer included, at ``depth``."""

    length: int
    depth: float
    accuracy: float
    trials: int


def passkey(
    decoder: Decoder,
    tokenizer: Any,
    lengths: Sequence[int],
    at_once: Callable[[int], int] = lambda length: TRIALS,
    seed: int = 0,
) -> list[Found]:
    """The accuracy at every length and depth, greedily decoded.

    Args:
        decoder: with or without adapters; where layers stream they are copied once for all prompts that go together.
        tokenizer: of the model.
        lengths: in tokens.
        at_once: how many prompts of a length may go together.
        seed: of the keys.

    Raises:
        InputError: a length has no room for the question.
    """
    found = []
    for length in lengths:
        for depth in DEPTHS:
            source = random.Random(f"{seed} {length} {depth}")
            keys = [str(source.randrange(10_000, 100_000)) for _ in range(TRIALS)]
            prompts = [prompt(tokenizer, length, depth, key) for key in keys]
            right = sum(map(_holds, _answers(decoder, tokenizer, prompts, at_once(length)), keys))
            found.append(Found(length, depth, right / len(keys), len(keys)))
    return found


def prompt(tokenizer: Any, length: int, depth: float, key: str) -> list[int]:
    """The ids of a prompt that leaves ``ANSWER_TOKENS`` of ``length``, as full of filler as whole sentences make it.

    Raises:
        InputError: there is no room for the question.
    """

    def ids(count: int) -> list[int]:
        before = round(depth * count)
        return token_ids(
            tokenizer, TASK + FILLER * before + HIDDEN.format(key=key) + FILLER * (count - before) + QUESTION
        )

    room = length - ANSWER_TOKENS
    least, one_more = len(ids(0)), len(ids(1))
    if least > room:
        raise InputError(
            f"A passkey prompt of {length} tokens has no room for the question, which takes {least + ANSWER_TOKENS}.",
            next_step="Name a larger length with --passkey.",
        )
    count = (room - least) // (one_more - least)
    while len(made := ids(count)) > room:  # a sentence may take a token more beside others
        count -= 1
    return made


def _answers(decoder: Decoder, tokenizer: Any, prompts: list[list[int]], at_once: int) -> list[str]:
    made: list[list[int]] = []
    for start in range(0, len(prompts), at_once):
        made += generate_all(decoder, prompts[start : start + at_once], ANSWER_TOKENS, {tokenizer.eos_token_id})
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in made]


def _holds(answer: str, key: str) -> bool:
    """Whether the first number of the answer is the key."""
    number = re.search(r"\d+", answer)
    return number is not None and number[0] == key


def check_lengths(spec: ModelSpec, lengths: Sequence[int]) -> None:
    """Raise InputError for a length that the model does not take."""
    for length in lengths:
        if length > spec.max_positions:
            raise InputError(
                f"A passkey prompt of {length} tokens is longer than the {spec.max_positions} that {spec.name} takes.",
                next_step="Name smaller lengths with --passkey.",
            )
