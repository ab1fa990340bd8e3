"""A few evaluation samples for people to read: what is asked, what should come, and what the model says."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from effitrain.core.budget import MemoryBudget
from effitrain.core.generation import generation_bytes
from effitrain.core.ledger import gpu_bytes
from effitrain.core.memory import held_lines
from effitrain.core.plan import Plan
from effitrain.core.recipe import Recipe
from effitrain.core.spec import ModelSpec
from effitrain.data.templates import find_template, stop_ids
from effitrain.data.tokenized import IGNORE, TokenSet
from effitrain.evals.generate import generate_all
from effitrain.model.decoder import Decoder

COUNT = 3
PROMPT, ANSWER = 192, 40  # tokens of a prompt and of an answer, at most
_LOOKED_AT = 64  # samples among which they are found


@dataclass(frozen=True)
class Asked:
    """A prompt and the beginning of the answer that the data has, as token ids."""

    prompt: list[int]
    wanted: list[int]


@dataclass(frozen=True)
class Samples:
    """Prompts, and how a model answers them as it stands."""

    decoder: Decoder
    tokenizer: Any
    template: str
    asked: tuple[Asked, ...]

    def answers(self) -> list[str]:
        """What the model says, greedily, in about as many tokens as the data has there."""
        stop = stop_ids(find_template(self.template, self.tokenizer), self.tokenizer)
        prompts, most = [one.prompt for one in self.asked], max(len(one.wanted) for one in self.asked)
        training = self.decoder.training
        made = generate_all(self.decoder, prompts, most, stop)
        self.decoder.train(training)
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in made]

    def rows(self, before: Sequence[str], after: Sequence[str]) -> list[dict[str, str]]:
        """``prompt``, ``wanted``, ``before`` and ``after`` of each as text."""
        texts = (
            (self.tokenizer.decode(one.prompt), self.tokenizer.decode(one.wanted, skip_special_tokens=True))
            for one in self.asked
        )
        return [
            {"prompt": prompt, "wanted": wanted, "before": first, "after": last}
            for (prompt, wanted), first, last in zip(texts, before, after, strict=True)
        ]


def choose(tokens: TokenSet) -> tuple[Asked, ...]:
    """The first samples that are short enough to read; of running text its first half is the prompt."""
    found = (asked for row in range(min(_LOOKED_AT, len(tokens))) for asked in _asked(tokens, row))
    return tuple(asked for asked, _ in zip(found, range(COUNT), strict=False))


def _asked(tokens: TokenSet, row: int) -> Iterator[Asked]:
    part = slice(tokens.offsets[row], tokens.offsets[row + 1])
    ids, trained = tokens.input_ids[part].tolist(), tokens.labels[part] != IGNORE
    first = int(np.argmax(trained))
    if first < 2:  # the first token of a sample is never trained
        first, trained = min(len(ids) // 2, PROMPT), np.ones_like(trained)
    end = first + int(np.argmin(np.append(trained[first:], False)))
    if 0 < first <= PROMPT and end > first:
        yield Asked(ids[:first], ids[first : min(end, first + ANSWER)])


def has_room(asked: Sequence[Asked], spec: ModelSpec, recipe: Recipe, plan: Plan, budget: MemoryBudget) -> bool:
    """Whether answering takes no more than a training step does beside what is there all the time."""
    longest = max(len(one.prompt) for one in asked) + max(len(one.wanted) for one in asked)
    room = plan.peak_bytes - gpu_bytes(held_lines(spec, recipe, plan.settings, budget))
    return generation_bytes(spec, plan.settings, longest, len(asked)) <= room
