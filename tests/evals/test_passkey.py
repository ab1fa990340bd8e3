"""Passkey retrieval: prompts of the length and depth asked for, and answers counted as they should be."""

import re

import pytest
import torch

from effitrain.core.errors import InputError
from effitrain.evals import passkey as room
from effitrain.evals.passkey import ANSWER_TOKENS, DEPTHS, FILLER, TRIALS, check_lengths, passkey, prompt
from effitrain.model.load import find_base, load_model
from effitrain.planning import recipe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tiny_model):
    return find_base(str(tiny_model("llama")))


@pytest.mark.parametrize("length", [400, 1000, 1777])
@pytest.mark.parametrize("depth", DEPTHS)
def test_prompts_have_the_length_and_the_depth(base, length, depth):
    tokenizer = base.tokenizer()
    ids = prompt(tokenizer, length, depth, "48213")
    filler = len(tokenizer(FILLER, add_special_tokens=False)["input_ids"])
    assert length - ANSWER_TOKENS - filler < len(ids) <= length - ANSWER_TOKENS
    text = tokenizer.decode(ids)
    before, after = text.split("The pass key is 48213. Remember it. 48213 is the pass key.\n")
    total = before.count(FILLER) + after.count(FILLER)
    assert before.count(FILLER) == round(depth * total) and text.endswith("What is the pass key? The pass key is")


def test_a_real_tokenizer(data_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(data_dir / "models" / "stories3M")
    for length in (200, 512, 1000):
        ids = prompt(tokenizer, length, 0.5, "48213")
        assert length - ANSWER_TOKENS - 40 < len(ids) <= length - ANSWER_TOKENS and ids[0] == tokenizer.bos_token_id
        assert len(tokenizer.encode(" 48213.")) <= ANSWER_TOKENS


def test_answers_are_counted(base, monkeypatch):
    """A reader that sees the last 600 tokens of a prompt, and answers with the first number there."""
    tokenizer, sizes = base.tokenizer(), []

    def reads(decoder, prompts, max_new_tokens, stop):
        sizes.append(len(prompts))
        seen = [re.search(r"\d{5}", tokenizer.decode(ids[-600:])) for ids in prompts]
        return [
            tokenizer.encode(f" {found[0]}. {found[0]}" if found else " 1 is", add_special_tokens=False)
            for found in seen
        ]

    monkeypatch.setattr(room, "generate_all", reads)
    found = passkey(None, tokenizer, [500, 1500], lambda length: 2 if length > 1000 else 9)
    by_place = {(one.length, one.depth): one.accuracy for one in found}
    assert all(by_place[500, depth] == 1 for depth in DEPTHS)
    assert by_place[1500, 0.0] == 0 and by_place[1500, 1.0] == 1
    assert {one.trials for one in found} == {TRIALS} and sizes == [5] * 5 + [2, 2, 1] * 5


def test_a_model_answers_and_the_keys_depend_on_the_seed_alone(base, monkeypatch):
    decoder = load_model(base, recipe(model=base.name, quant="none", dtype="fp32"), CPU).eval()
    assert len(passkey(decoder, base.tokenizer(), [420])) == len(DEPTHS)
    asked = []
    monkeypatch.setattr(
        room, "generate_all", lambda decoder, prompts, *_: asked.append(prompts) or [[5]] * len(prompts)
    )
    for seed in (1, 1, 2):
        passkey(decoder, base.tokenizer(), [420], seed=seed)
    third = len(asked) // 3
    assert asked[:third] == asked[third : 2 * third] != asked[2 * third :]


def test_lengths_that_cannot_be(base):
    with pytest.raises(InputError, match="has no room for the question"):
        prompt(base.tokenizer(), 60, 0.5, "12345")
    with pytest.raises(InputError, match=f"longer than the {base.spec.max_positions}"):
        check_lengths(base.spec, [100, base.spec.max_positions + 1])
