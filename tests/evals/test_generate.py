"""Many prompts at once give what each gives alone, resident and streamed, and cost one pass over the layers a token."""

import pytest
import torch

from effitrain.core.placement import place
from effitrain.evals.generate import generate, generate_all
from effitrain.model.decoder import build
from effitrain.model.load import fill, find_base, stream
from effitrain.stream.fresh import FreshLayers

CPU, LAYERS = torch.device("cpu"), 4
PROMPTS = [[5, 9, 31], [77], list(range(20, 60)), [8, 8, 8, 120, 7]]


@pytest.fixture(scope="module")
def decoders(tiny_model):
    """A model, resident and streamed."""
    base, made = find_base(str(tiny_model("qwen3", layers=LAYERS))), []
    for placement in (None, place(LAYERS, 1, 2)):
        decoder = build(base.spec, base.source.config, "x")
        fill(decoder, base.weights(), "nf4", torch.float32, CPU, streamed=placement.streamed if placement else ())
        if placement:
            stream(decoder, FreshLayers(base.spec, base.weights(), "nf4", "fp32"), placement, CPU)
        made.append(decoder)
    return made


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_together_is_as_alone(decoders, temperature):
    whole, streamed = decoders
    alone = [list(generate(whole, prompt, 12, set(), temperature, 3)) for prompt in PROMPTS]
    assert [len(ids) for ids in alone] == [12] * 4 and len({tuple(ids) for ids in alone}) == 4
    stop = {alone[0][5], alone[3][2]}
    ended = [list(generate(whole, prompt, 12, stop, temperature, 3)) for prompt in PROMPTS]
    assert len({len(ids) for ids in ended}) > 1
    for decoder in decoders:
        assert generate_all(decoder, PROMPTS, 12, set(), temperature, 3) == alone
        assert generate_all(decoder, PROMPTS, 12, stop, temperature, 3) == ended
    assert [list(generate(streamed, prompt, 12, set(), temperature, 3)) for prompt in PROMPTS] == alone


def test_a_pass_over_the_layers_serves_all_prompts(decoders):
    _, streamed = decoders
    before = streamed.streamer.traffic.copies
    generate_all(streamed, PROMPTS, 10, set())
    assert streamed.streamer.traffic.copies - before <= 10 * (LAYERS - 1)


def test_the_model_s_length_ends_a_text(decoders):
    whole, _ = decoders
    prompt = [7] * (whole.spec.max_positions - 3)
    assert len(list(generate(whole, prompt, 50, set()))) == 3
    assert [len(made) for made in generate_all(whole, [prompt, [7]], 5, set())] == [3, 5]
