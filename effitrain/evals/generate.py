"""Generate text with a key-value cache: greedy or sampled, for one prompt or for many at once."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from effitrain.model.decoder import Decoder, Rows


@torch.no_grad()
def generate(
    decoder: Decoder,
    prompt: list[int],
    max_new_tokens: int,
    stop: set[int],
    temperature: float = 0.0,
    seed: int = 0,
    length: int | None = None,
) -> Iterator[int]:
    """Yield new token ids until one of ``stop``, ``max_new_tokens`` or ``length``.

    Args:
        decoder: with or without adapters; put in evaluation mode.
        prompt: token ids, at least one.
        max_new_tokens: at most so many are made.
        stop: ids that end the text; not yielded.
        temperature: 0 picks the likeliest token, above that samples.
        seed: of the sampling.
        length: tokens of the prompt and the new ones; None for the model's.
    """
    decoder.eval()
    text = _Text(decoder, prompt, max_new_tokens, stop, temperature, seed, length)
    while text.room:
        made = len(text.made)
        text.take(decoder.through([text.rows()])[0])
        yield from text.made[made:]


@torch.no_grad()
def generate_all(
    decoder: Decoder,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    stop: set[int],
    temperature: float = 0.0,
    seed: int = 0,
    length: int | None = None,
) -> list[list[int]]:
    """The new token ids for each prompt, the same as ``generate`` gives one by one.

    All texts pass a layer before the next layer is needed: a streamed layer is copied once for all of them.
    """
    decoder.eval()
    texts = [_Text(decoder, prompt, max_new_tokens, stop, temperature, seed, length) for prompt in prompts]
    while growing := [text for text in texts if text.room]:
        for text, x in zip(growing, decoder.through([text.rows() for text in growing]), strict=True):
            text.take(x)
    return [text.made for text in texts]


class _Text:
    """A prompt and what was made of it; ``room`` is how many tokens it may still get."""

    def __init__(
        self, decoder: Decoder, prompt: list[int], max_new_tokens: int, stop: set[int], temperature: float, seed: int,
        length: int | None,
    ):  # fmt: skip
        from transformers import DynamicCache

        self.decoder, self.stop, self.temperature = decoder, stop, temperature
        self.cache = DynamicCache(config=decoder.config)
        self.source = torch.Generator().manual_seed(seed)
        self.next, self.seen = prompt, 0
        self.made: list[int] = []
        self.room = min(max_new_tokens, (length or decoder.spec.max_positions) - len(prompt))

    def rows(self) -> Rows:
        """The tokens that the model has not seen."""
        positions = torch.arange(self.seen, self.seen + len(self.next))[None]
        return Rows(torch.tensor([self.next]), positions, cache=self.cache)

    def take(self, x: Tensor) -> None:
        """Go on from the last layer's output [1, T, H]."""
        logits = self.decoder.logits(self.decoder.finish(x[:, -1:])[0])[0].float().cpu()
        token = _pick(logits, self.temperature, self.source)
        if token in self.stop:
            self.room = 0
            return
        self.made.append(token)
        self.seen += len(self.next)
        self.next = [token]
        self.room -= 1


def _pick(logits: Tensor, temperature: float, source: torch.Generator) -> int:
    if temperature <= 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=source))
