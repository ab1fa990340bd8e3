import numpy as np
import pytest

from effitrain.data.formats import Turn
from effitrain.data.marks import Rendered
from effitrain.data.templates import find_template
from effitrain.data.tokenized import IGNORE, Sample, TokenSet, bos_of, cut, encode, join, pieces, token_ids

CODE = "def f(x):\n        return    x  \n\n\n"


def one(tokenizer, text, *spans):
    return next(encode(tokenizer, [Rendered(text, spans)]))


def sample(length, *trained):
    return Sample(np.arange(length, dtype=np.int32), np.isin(np.arange(length), trained))


@pytest.mark.parametrize("text", ["hello there", CODE, "caf\u00e9 😀😀 né", " ", "\n\n", "<s>twice<s>", "</s>"])
def test_ids_decode_to_the_text_after_one_bos(tokenizer, text):
    ids = one(tokenizer, text).ids
    assert tokenizer.decode(ids) == ("" if text.startswith("<s>") else "<s>") + text
    assert token_ids(tokenizer, text) == ids.tolist()


@pytest.mark.parametrize("answer", [CODE, "    indented", "😀 café", " a", "\n\nb", "x"])
def test_every_character_of_an_answer_is_trained_and_no_token_before_it(tokenizer, answer):
    prompt = "### Instruction:\nsay\n\n### Response:\n"
    text = f"{prompt}{answer}</s>next"
    made = one(tokenizer, text, (len(prompt), len(prompt) + len(answer) + 4))
    trained = tokenizer.decode(made.ids[made.trained])
    assert trained.endswith(f"{answer}</s>")
    assert len(trained) - len(answer) - 4 <= 2  # a token may reach over the border, here two line ends
    assert prompt.endswith(trained[: len(trained) - len(answer) - 4])


def test_spaces_that_offsets_leave_out_are_trained(tokenizer):
    raw = tokenizer(CODE, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    assert any(start == end for start, end in raw)  # else this test shows nothing
    assert one(tokenizer, CODE, (0, len(CODE))).trained[1:].all()


def test_a_token_over_the_border_belongs_to_the_answer(tokenizer):
    text = "a\n\n\nb"
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    made = one(tokenizer, text, (2, len(text)))
    assert len(whole) < len(text)
    assert tokenizer.decode(made.ids[made.trained]) == "\n\n\nb"


def test_nothing_and_all_trained(tokenizer):
    assert not one(tokenizer, "hello").trained.any()
    assert one(tokenizer, "hello", (0, 5)).trained.tolist() == [
        False,
        *[True] * (len(token_ids(tokenizer, "hello")) - 1),
    ]
    assert one(tokenizer, "").ids.tolist() == [tokenizer.bos_token_id]


def test_many_texts_are_the_same_as_each_alone(tokenizer):
    items = [Rendered(f"hello {n}", ((n % 5, 6),)) for n in range(1100)]
    together = list(encode(tokenizer, iter(items)))
    assert len(together) == 1100
    for n in (0, 511, 512, 1099):
        (alone,) = encode(tokenizer, [items[n]])
        assert together[n].ids.tolist() == alone.ids.tolist()
        assert together[n].trained.tolist() == alone.trained.tolist()


def test_no_bos_where_the_tokenizer_uses_none(make_tokenizer):
    tokenizer = make_tokenizer(add_bos=False)
    assert bos_of(tokenizer) == []
    assert tokenizer.decode(one(tokenizer, "hello").ids) == "hello"
    assert len(one(tokenizer, "").ids) == len(one(tokenizer, "").trained) == 0


def test_a_bos_that_the_template_writes_is_not_doubled(make_tokenizer):
    for add_bos in (True, False):
        tokenizer = make_tokenizer(add_bos=add_bos)
        assert tokenizer.decode(token_ids(tokenizer, "<s>hello")) == "<s>hello"


def test_a_sentencepiece_tokenizer(stories):
    template = find_template("plain", stories)
    turns = (Turn("user", "Tell me."), Turn("assistant", "Once upon a time…\n  there 😀 was"))
    (rendered,) = template.render(turns, "row 1")
    made = one(stories, rendered.text, *rendered.trained)
    assert (
        stories.decode(made.ids) == f"<s> {rendered.text}"
    )  # its decoder shows the piece that begins a text as a space
    assert stories.decode(made.ids[made.trained]) == "Once upon a time…\n  there 😀 was</s>"
    assert made.ids[-1] == stories.eos_token_id and made.trained[-1]


@pytest.mark.parametrize(
    ("truncation", "bos", "ids"),
    [
        ("right", [], [0, 1, 2, 3]),
        ("left", [], [6, 7, 8, 9]),
        ("left", [0], [0, 7, 8, 9]),
        ("right", [0], [0, 1, 2, 3]),
    ],
)
def test_cutting(truncation, bos, ids):
    kept = cut(sample(10, 3, 7, 8), 4, truncation, bos)
    assert kept.ids.tolist() == ids
    assert kept.ids[kept.trained].tolist() == [i for i in (3, 7, 8) if i in ids]


def test_what_is_dropped():
    assert cut(sample(10, 3), 9, "drop", []) is None
    assert cut(sample(10, 3), 10, "drop", []).ids.tolist() == list(range(10))
    assert cut(sample(10, 8), 4, "right", []) is None
    assert cut(sample(10, 3), 4, "left", []) is None
    assert cut(sample(10, 6), 4, "left", []) is None  # the first token that is left: nothing predicts it
    assert cut(sample(10), 20, "right", []) is None
    assert cut(sample(10, 0), 20, "right", []) is None


def test_pieces_of_a_long_text():
    whole = sample(8, *range(8))
    assert [piece.ids.tolist() for piece in pieces(whole, 3, [])] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert [piece.ids.tolist() for piece in pieces(whole, 4, [0])] == [[0, 1, 2, 3], [0, 4, 5, 6], [0, 7]]
    assert [piece.ids.tolist() for piece in pieces(sample(7), 3, [])] == [[0, 1, 2], [3, 4, 5]]
    assert all(piece.trained.all() for piece in pieces(sample(8), 4, [0]))


def test_a_token_set_and_its_subsets():
    tokens = join([sample(3, 1, 2), sample(2, 0, 1), sample(4, 0)])
    assert len(tokens) == 3
    assert tokens.lengths.tolist() == [3, 2, 4]
    assert tokens.labels.tolist() == [IGNORE, 1, 2, IGNORE, 1, *[IGNORE] * 4]
    assert (tokens.input_ids.dtype, tokens.labels.dtype, tokens.offsets.dtype) == (np.int32, np.int32, np.int64)
    part = tokens.subset(np.array([2, 0]))
    assert part.input_ids.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert part.labels.tolist() == [*[IGNORE] * 4, IGNORE, 1, 2]
    assert part.offsets.tolist() == [0, 4, 7]
    assert part.labels.dtype == np.int32


def test_an_empty_set():
    for empty in (join([]), join([sample(3, 1)]).subset(np.array([], np.int64))):
        assert isinstance(empty, TokenSet)
        assert len(empty) == 0
        assert empty.offsets.tolist() == [0]
        assert (empty.input_ids.dtype, empty.labels.dtype, empty.offsets.dtype) == (np.int32, np.int32, np.int64)
