import json
from dataclasses import asdict

import numpy as np
import pytest

from effitrain.core.errors import InputError
from effitrain.core.recipe import make_recipe
from effitrain.data import prepare
from effitrain.data.prepare import check_data, prepare_data
from effitrain.data.tokenized import IGNORE


@pytest.fixture
def jsonl(tmp_path):
    """``jsonl(rows)``: a file that holds them."""

    def write(rows, name="my.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return write


def made(tokenizer, dataset, max_seq_len=256, cache_dir=None, **fields):
    return prepare_data(make_recipe({"dataset": dataset, **fields}), tokenizer, max_seq_len, cache_dir)


def pairs(count, answer="yes"):
    return [{"prompt": f"question {n}", "completion": f"{answer} {n}"} for n in range(count)]


def texts(tokenizer, tokens):
    """Every sample decoded, with the trained part apart."""
    for start, end in zip(tokens.offsets, tokens.offsets[1:], strict=False):
        ids, labels = tokens.input_ids[start:end], tokens.labels[start:end]
        assert set(labels[labels != ids]) <= {IGNORE}
        yield tokenizer.decode(ids), tokenizer.decode(ids[labels != IGNORE])


# Real files: name, settings, format found, least and most share of tokens trained, samples.
REAL = [
    ("instruct/alpaca/alpaca_2000.json", {}, "alpaca", 0.7, 0.9, 2000),
    ("instruct/llamafactory/identity.json", {}, "alpaca", 0.6, 0.8, 91),
    ("instruct/self_instruct/seed_tasks.jsonl", {}, "alpaca", 0.4, 0.6, 173),
    ("instruct/self_instruct/user_oriented_instructions.jsonl", {}, "alpaca", 0.4, 0.6, 246),
    ("instruct/sharegpt/dummy_conversation.json", {}, "sharegpt", 0.4, 0.6, 500),
    ("instruct/llamafactory/glaive_toolcall_en_demo.json", {}, "sharegpt", 0.4, 0.7, 239),
    ("instruct/llamafactory/reason_tool_use_demo_50.jsonl", {}, "messages", 0.4, 0.8, 47),
    ("instruct/gsm8k/test_500.jsonl", {}, "prompt-completion", 0.6, 0.75, 500),
    (
        "instruct/humaneval/humaneval_100.jsonl",
        {"columns": "completion=canonical_solution"},
        "prompt-completion",
        0.2,
        0.4,
        98,
    ),
    ("corpora/tinystories/valid_stories.jsonl", {}, "text", 0.99, 1.0, 457),
    ("corpora/books/moby_dick_2701.txt", {}, "text", 0.99, 1.0, 910),
]


@pytest.mark.parametrize(("file", "fields", "format", "least", "most", "samples"), REAL)
def test_real_files(data_dir, stories, file, fields, format, least, most, samples):
    prepared = made(stories, str(data_dir / file), 512, **fields)
    stats, train = prepared.stats, prepared.train
    assert stats.format == format
    assert stats.template == ("none" if format == "text" else "plain")
    assert least < stats.trained_share < most
    assert stats.trained_share == stats.trained_tokens / stats.tokens
    assert stats.samples == samples == len(train) + len(prepared.eval)
    assert stats.tokens == len(train.input_ids) + len(prepared.eval.input_ids)
    assert stats.trained_tokens == train.trained_tokens + prepared.eval.trained_tokens
    assert train.lengths.max() <= 512
    assert (train.input_ids[train.offsets[:-1]] == stories.bos_token_id).all()
    assert 0.02 < len(prepared.eval) / samples < 0.08
    assert "«" in prepared.preview and "»" in prepared.preview


def test_real_answers_are_trained_and_questions_are_not(data_dir, stories):
    file = data_dir / "instruct/gsm8k/test_500.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    prepared = made(stories, str(file), 2048, eval_fraction=0)
    for row, (whole, trained) in zip(rows, texts(stories, prepared.train), strict=True):
        assert whole == f"<s> {row['question']}\n{row['answer']}</s>"
        assert trained == f"{row['answer']}</s>"


def test_a_book_loses_nothing_when_cut(data_dir, stories):
    file = data_dir / "corpora/tinystories/valid.txt"
    prepared = made(stories, str(file), 512, eval_fraction=0)
    ids = prepared.train.input_ids
    assert stories.decode(ids[ids != stories.bos_token_id]) == file.read_text() + "</s>"


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_other_kinds_of_files_give_the_same_tokens(jsonl, tmp_path, tokenizer, suffix):
    import pyarrow
    from pyarrow import csv, parquet

    expected = made(tokenizer, jsonl(pairs(20)))
    table = pyarrow.Table.from_pylist(pairs(20))
    (csv.write_csv if suffix == "csv" else parquet.write_table)(table, tmp_path / f"set.{suffix}")
    got = made(tokenizer, str(tmp_path / f"set.{suffix}"))
    assert got.train.input_ids.tolist() == expected.train.input_ids.tolist()
    assert got.train.labels.tolist() == expected.train.labels.tolist()


def test_the_built_in_set(tokenizer):
    prepared = prepare_data(make_recipe({}), tokenizer, 512)
    assert prepared.stats.format == "alpaca"
    assert len(prepared.eval) == min(200, round(0.05 * prepared.stats.samples))


def test_preview_marks_what_is_trained(jsonl, tokenizer):
    prepared = made(tokenizer, jsonl([{"prompt": "a long question", "completion": "no"}, *pairs(3, "well, yes")]))
    assert prepared.preview in ("<s>a long question\n«no</s>»", "<s>question 0\n«well, yes 0</s>»")
    everything = made(tokenizer, jsonl(pairs(1)), train_on_prompt=True)
    assert everything.preview == "<s>«question 0\nyes 0</s>»"
    assert everything.stats.trained_tokens == everything.stats.tokens - 1


def test_preview_shortens_long_parts(jsonl, tokenizer):
    prepared = made(tokenizer, jsonl([{"prompt": "q" * 5000, "completion": "a" * 5000}]), 20_000)
    assert len(prepared.preview) < 1300
    assert " […] " in prepared.preview and prepared.preview.endswith("aaa</s>»")


def test_cutting_is_counted(jsonl, tokenizer):
    rows = [
        {"prompt": "q", "completion": "a"},
        {"prompt": "q", "completion": "a" * 90},
        {"prompt": "q" * 90, "completion": "a"},
    ]
    right = made(tokenizer, jsonl(rows), 50, eval_fraction=0)
    assert (right.stats.samples, right.stats.truncated, right.stats.dropped) == (2, 1, 1)
    left = made(tokenizer, jsonl(rows), 50, truncation="left", eval_fraction=0)
    assert (left.stats.samples, left.stats.truncated, left.stats.dropped) == (3, 2, 0)
    assert [whole[:4] for whole, _ in texts(tokenizer, left.train)] == ["<s>q", "<s>a", "<s>q"]
    drop = made(tokenizer, jsonl(rows), 50, truncation="drop", eval_fraction=0)
    assert (drop.stats.samples, drop.stats.truncated, drop.stats.dropped) == (1, 0, 2)


def test_turns_after_the_last_answer_and_talks_without_one_are_left_out(jsonl, tokenizer):
    question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    rows = [{"messages": [question, answer, question]}, {"messages": [question]}]
    prepared = made(tokenizer, jsonl(rows), eval_fraction=0)
    assert list(texts(tokenizer, prepared.train)) == [
        ("<s>### Instruction:\nq\n\n### Response:\na</s>", "a</s>"),
    ]
    assert prepared.stats.dropped == 1


def test_long_texts_are_cut_and_short_ones_kept_apart(jsonl, tokenizer):
    prepared = made(tokenizer, jsonl([{"text": "x" * 100}, {"text": "y"}]), 41, eval_fraction=0)
    wholes = [whole for whole, _ in texts(tokenizer, prepared.train)]
    assert wholes == ["<s>" + "x" * 40, "<s>" + "x" * 40, "<s>" + "x" * 20 + "</s>", "<s>y</s>"]
    assert prepared.stats.truncated == prepared.stats.dropped == 0


def test_joined_documents_fill_every_row_and_only_the_tail_is_lost(jsonl, tokenizer):
    rows = [{"text": "x" * 30}, {"text": "y" * 5}, {"text": "z" * 60}]
    prepared = made(tokenizer, jsonl(rows), 16, eval_fraction=0, join_documents=True)
    assert set(prepared.train.lengths) == {16}
    ids = prepared.train.input_ids.reshape(-1, 16)
    assert (ids[:, 0] == tokenizer.bos_token_id).all()
    stream = "x" * 30 + "</s><s>" + "y" * 5 + "</s><s>" + "z" * 60 + "</s>"
    tail = (30 + 2 + 5 + 2 + 60 + 1) % 15  # each mark is one token
    assert tokenizer.decode(ids[:, 1:].flatten()) + "z" * (tail - 1) + "</s>" == stream
    assert prepared.stats.dropped == 1 and prepared.train.trained_tokens == 15 * len(ids)


def test_joined_text_shorter_than_a_row_is_kept(jsonl, tokenizer):
    prepared = made(tokenizer, jsonl([{"text": "ab"}, {"text": "c"}]), 16, eval_fraction=0, join_documents=True)
    assert [whole for whole, _ in texts(tokenizer, prepared.train)] == ["<s>ab</s><s>c</s>"]
    assert prepared.stats.dropped == 0


def test_conversations_are_not_joined(jsonl, tokenizer):
    with pytest.raises(InputError, match=r"--join-documents is for running text, and .* is prompt-completion"):
        made(tokenizer, jsonl(pairs(3)), join_documents=True)


@pytest.mark.parametrize(
    ("rows", "fraction", "held_out"),
    [
        (100, 0.05, 5), (100, 0, 0), (2, 0.05, 0), (9, 0.05, 0), (10, 0.05, 1), (1, 0.9, 0), (3, 0.9, 2),
        (5000, 0.05, 200), (30, 0.05, 2),
    ],
)  # fmt: skip
def test_the_size_of_the_evaluation_split(jsonl, tokenizer, rows, fraction, held_out):
    prepared = made(tokenizer, jsonl(pairs(rows)), eval_fraction=fraction)
    assert len(prepared.eval) == held_out
    assert len(prepared.train) == rows - held_out
    sides = [{whole for whole, _ in texts(tokenizer, part)} for part in (prepared.train, prepared.eval)]
    assert len(sides[0] | sides[1]) == rows


def test_the_split_depends_on_the_seed_alone(jsonl, tokenizer):
    split = [
        [whole for whole, _ in texts(tokenizer, made(tokenizer, jsonl(pairs(200)), seed=seed).eval)]
        for seed in (1, 1, 2)
    ]
    assert split[0] == split[1] != split[2]


def test_pieces_of_one_row_stay_on_one_side(jsonl, tokenizer):
    prepared = made(tokenizer, jsonl([{"text": chr(97 + n) * 200} for n in range(10)]), 50, eval_fraction=0.3)
    letters = [{whole[3] for whole, _ in texts(tokenizer, part)} for part in (prepared.train, prepared.eval)]
    assert len(letters[1]) == 3
    assert not letters[0] & letters[1]


def test_running_text_is_split_by_its_pieces(tmp_path, tokenizer):
    (tmp_path / "book.txt").write_text("hello there " * 1000)
    prepared = made(tokenizer, str(tmp_path / "book.txt"), 50, eval_fraction=0.1)
    assert len(prepared.eval) == round(0.1 * prepared.stats.samples) > 1


def test_a_named_evaluation_set_is_taken_whole(jsonl, tokenizer):
    other = jsonl([{"text": f"text {n}"} for n in range(300)], "other.jsonl")
    prepared = made(tokenizer, jsonl(pairs(10)), eval_dataset=other)
    assert (len(prepared.train), len(prepared.eval)) == (10, 300)
    assert prepared.stats.samples == 10


@pytest.mark.parametrize(
    ("rows", "fields", "message"),
    [
        ([], {}, "The data set {} is empty"),
        ([{"a": "x"}], {}, "has the columns a, and no known format has these"),
        ([*pairs(2), {"prompt": "q", "completion": None}], {}, "my.jsonl row 3: the column completion is null"),
        ([*pairs(2), {"prompt": "q", "completion": float("nan")}], {}, "my.jsonl row 3: the column completion is NaN"),
        (pairs(2), {"format": "alpaca"}, "which is not alpaca"),
        (pairs(2), {"template": "vicuna"}, "There is no template 'vicuna'"),
        ([{"prompt": "q" * 900, "completion": "a"}] * 5, {}, "5 samples dropped, none kept"),
        ([{"messages": [{"role": "user", "content": "q"}]}], {}, "1 sample dropped, none kept"),
        ([{"prompt": "q" * 240, "completion": "a"}] * 5, {"template": "plain"}, "Only 10 of the 1220 tokens"),
    ],
)
def test_errors(jsonl, tokenizer, rows, fields, message):
    path = jsonl(rows)
    with pytest.raises(InputError) as error:
        made(tokenizer, path, **fields)
    assert message.format(path) in str(error.value)


def test_bad_data_is_told_without_a_tokenizer(jsonl):
    good, bad = jsonl(pairs(3)), jsonl([*pairs(2), {"prompt": "q", "completion": ""}], "bad.jsonl")
    check_data(make_recipe({"dataset": good, "eval_dataset": jsonl([{"text": "t"}], "text.jsonl")}))
    for fields, message in [
        ({"dataset": bad}, r"bad\.jsonl row 3: the column completion is empty"),
        ({"dataset": good, "eval_dataset": bad}, r"bad\.jsonl row 3: the column completion is empty"),
        ({"dataset": jsonl([{"text": None}], "text.jsonl")}, r"text\.jsonl row 1: the column text is null"),
        ({"dataset": jsonl([], "none.jsonl")}, "is empty"),
        ({"dataset": good, "template": "vicuna"}, "There is no template 'vicuna'"),
    ]:
        with pytest.raises(InputError, match=message):
            check_data(make_recipe(fields))


def test_an_evaluation_set_is_checked_too(jsonl, tokenizer):
    with pytest.raises(InputError, match=r"other\.jsonl row 1: the column text is empty"):
        made(tokenizer, jsonl(pairs(3)), eval_dataset=jsonl([{"text": ""}], "other.jsonl"))


def test_the_second_time_comes_from_the_cache(jsonl, tokenizer, tmp_path, monkeypatch):
    path = jsonl(pairs(30))
    first = made(tokenizer, path, cache_dir=tmp_path / "cache")
    monkeypatch.setattr(prepare, "build", None)
    second = made(tokenizer, path, cache_dir=tmp_path / "cache")
    assert asdict(first.stats) == asdict(second.stats)
    assert (first.preview, first.fingerprint) == (second.preview, second.fingerprint)
    for name in ("train", "eval"):
        for field, array in vars(getattr(first, name)).items():
            again = getattr(getattr(second, name), field)
            assert again.dtype == array.dtype
            assert np.array_equal(again, array)


def test_a_harmed_cache_is_built_again(jsonl, tokenizer, tmp_path):
    path = jsonl(pairs(30))
    first = made(tokenizer, path, cache_dir=tmp_path)
    tokens = tmp_path / first.fingerprint / "tokens.safetensors"
    good = tokens.read_bytes()
    tokens.write_bytes(good[:-4] + b"\0\0\0\0")
    again = made(tokenizer, path, cache_dir=tmp_path)
    assert np.array_equal(again.eval.labels, first.eval.labels)
    assert tokens.read_bytes() == good


@pytest.mark.parametrize(
    "fields",
    [
        {"template": "chatml"},
        {"train_on_prompt": True},
        {"truncation": "left"},
        {"eval_fraction": 0.5},
        {"seed": 7},
        {"max_seq_len": 99},
        {"columns": "prompt=completion,completion=prompt"},
        {"eval_dataset": "my.jsonl"},
    ],
)
def test_whatever_changes_the_tokens_changes_the_fingerprint(jsonl, tokenizer, fields):
    path = jsonl(pairs(10))
    if "eval_dataset" in fields:
        fields = {"eval_dataset": path}
    assert made(tokenizer, path, **fields).fingerprint != made(tokenizer, path).fingerprint


def test_another_tokenizer_or_chat_template_changes_the_fingerprint(jsonl, make_tokenizer):
    path, changed = jsonl(pairs(10)), make_tokenizer()
    before = made(make_tokenizer(), path).fingerprint
    assert made(changed, path).fingerprint == before
    changed.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    assert made(changed, path).fingerprint != before
    assert made(make_tokenizer(add_bos=False), path).fingerprint != before


def test_settings_of_the_run_do_not_change_it(jsonl, tokenizer):
    path = jsonl(pairs(10))
    assert made(tokenizer, path, lr=0.5, packing=True).fingerprint == made(tokenizer, path).fingerprint
