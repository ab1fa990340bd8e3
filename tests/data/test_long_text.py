import numpy as np
import pytest

from effitrain.data import long_text
from effitrain.data.long_text import encode_texts
from effitrain.data.tokenized import bos_of


@pytest.fixture
def small_windows(monkeypatch):
    """A chapter takes many windows."""
    monkeypatch.setattr(long_text, "WINDOW", 5000)
    monkeypatch.setattr(long_text, "OVERLAP", 300)


def whole(tokenizer, text):
    return bos_of(tokenizer) + tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", ["stories", "tokenizer"])
@pytest.mark.parametrize("length", [4999, 5001, 5301, 10_000, 10_305, 60_000])
def test_windows_give_the_ids_of_the_whole_text(request, data_dir, small_windows, name, length):
    tokenizer = request.getfixturevalue(name)
    text = (data_dir / "corpora/books/war_and_peace_2600.txt").read_text(encoding="utf-8-sig")[7000 : 7000 + length]
    (sample,) = encode_texts(tokenizer, [text])
    assert sample.ids.tolist() == whole(tokenizer, text)
    assert sample.trained.all() and len(sample.trained) == len(sample.ids) and sample.ids.dtype == np.int32


def test_text_that_is_hard_to_join(tokenizer, small_windows):
    texts = ["é" * 7000, " " * 12_000, "x" * 5001, "日本語 " * 3000, "def f(x):\n    " * 900]
    for text, sample in zip(texts, encode_texts(tokenizer, texts), strict=True):
        assert sample.ids.tolist() == whole(tokenizer, text)


def test_no_window_is_larger_than_it_should_be(tokenizer, small_windows):
    seen = []

    class Watched:
        bos_token_id = tokenizer.bos_token_id

        def __call__(self, texts, **kwargs):
            seen.extend(len(text) for text in texts)
            return tokenizer(texts, **kwargs)

    text = "A line of words, and another.\n" * 1000
    short = ["a b c"] * 4000
    samples = list(encode_texts(Watched(), [*short, text]))
    assert max(seen) <= 5000 + 2 * 300 and len(seen) >= 4000 + len(text) / 5600
    assert len(samples) == 4001 and samples[-1].ids.tolist() == whole(tokenizer, text)


def test_windows_are_joined_only_where_they_agree():
    ids, starts = np.arange(40, dtype=np.int32), np.arange(40) * 3
    other = np.where(ids < 20, -1, ids).astype(np.int32)  # the second window came to itself at token 20
    assert long_text._joint((ids, starts), (ids, starts), 30) == (10, 10)
    assert long_text._joint((ids, starts), (other, starts), 30) == (28, 28)
    assert long_text._joint((ids, starts), (other, starts + 1), 30) is None
