"""Generate text with a key-value cache: greedy or sampled."""

from collections.abc import Iterator

import torch
from torch import Tensor

from effitrain.model.decoder import Decoder


@torch.no_grad()
def generate(
    decoder: Decoder,
    prompt: list[int],
    max_new_tokens: int,
    stop: set[int],
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[int]:
    """Yield new token ids until one of ``stop``, ``max_new_tokens`` or the model's length.

    Args:
        decoder: with or without adapters; put in evaluation mode.
        prompt: token ids, at least one.
        max_new_tokens: at most so many are made.
        stop: ids that end the text; not yielded.
        temperature: 0 picks the likeliest token, above that samples.
        seed: of the sampling.
    """
    from transformers import DynamicCache

    decoder.eval()
    cache = DynamicCache(config=decoder.config)
    source = torch.Generator().manual_seed(seed)
    ids = torch.tensor([prompt])
    start = 0
    for _ in range(min(max_new_tokens, decoder.spec.max_positions - len(prompt))):
        positions = torch.arange(start, start + ids.shape[1])[None]
        hidden = decoder(ids, positions, cache=cache)
        token = _pick(decoder.logits(hidden[0, -1:])[0].float().cpu(), temperature, source)
        if token in stop:
            return
        yield token
        start += ids.shape[1]
        ids = torch.tensor([[token]])


def _pick(logits: Tensor, temperature: float, source: torch.Generator) -> int:
    if temperature <= 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=source))
