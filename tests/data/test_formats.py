import pytest

from effitrain.core.errors import InputError
from effitrain.data.formats import Layout, Turn, conversations, find_layout, text_of
from effitrain.data.sources import Row

PAIR = Layout("prompt-completion", {"prompt": "q", "completion": "a"})


def layout(columns, wanted="auto", named=None):
    return find_layout("my.jsonl", Row(dict.fromkeys(columns, "x"), "my.jsonl row 1"), wanted, named)


@pytest.mark.parametrize(
    ("columns", "format", "roles"),
    [
        (["instruction", "output"], "alpaca", {"instruction": "instruction", "output": "output"}),
        (["instruction", "input", "output", "text"], "alpaca", {"input": "input"}),
        (["id", "instruction", "instances"], "alpaca", {"output": "instances"}),
        (["instruction", "context", "response"], "alpaca", {"input": "context", "output": "response"}),
        (["id", "conversations"], "sharegpt", {"conversations": "conversations"}),
        (["messages", "prompt", "prompt_id"], "messages", {"messages": "messages"}),
        (["prompt", "completion"], "prompt-completion", {"prompt": "prompt", "completion": "completion"}),
        (["prompt", "response"], "prompt-completion", {"completion": "response"}),
        (["answer", "question"], "prompt-completion", {"prompt": "question", "completion": "answer"}),
        (["text", "url"], "text", {"text": "text"}),
    ],
)
def test_usual_columns_are_recognised(columns, format, roles):
    found = layout(columns)
    assert found.format == format
    assert found.columns.items() >= roles.items()


def test_named_columns_decide():
    columns = ["task_id", "prompt", "canonical_solution"]
    assert layout(columns, named={"completion": "canonical_solution"}).columns == {
        "prompt": "prompt",
        "completion": "canonical_solution",
    }
    both = ["instruction", "output", "question", "answer"]
    assert layout(both, named={"prompt": "question"}).format == "prompt-completion"
    assert layout(both, "alpaca").format == "alpaca"
    assert layout(both, named={"text": "output"}).columns == {"text": "output"}
    assert (
        layout(["prompt", "completion"], "prompt-completion", {"prompt": "completion"}).columns["prompt"]
        == "completion"
    )


@pytest.mark.parametrize(
    ("columns", "wanted", "named", "message"),
    [
        (["a", "b"], "auto", None, "has the columns a, b, and no known format has these"),
        ([], "auto", None, "has the columns (none)"),
        (["instruction", "output", "prompt", "response"], "auto", None, "which fit both alpaca and prompt-completion"),
        (["prompt", "completion"], "alpaca", None, "has the columns prompt, completion, which is not alpaca"),
        (["a", "b"], "auto", {"prompt": "q"}, "has the columns a, b, and none called q"),
        (["a", "b"], "auto", {"prompt": "a", "output": "b"}, "names prompt, output, which no format has together"),
        (
            ["a", "b"],
            "text",
            {"prompt": "a"},
            "names prompt, which no format has together.\nUse the names of one: text has text",
        ),
        (["a", "b"], "auto", {"prompt": "a"}, "no known format has these"),
    ],
)
def test_a_layout_that_cannot_be_told(columns, wanted, named, message):
    with pytest.raises(InputError) as error:
        layout(columns, wanted, named)
    assert message in str(error.value)


def test_the_way_out_is_named():
    with pytest.raises(InputError, match=r"--format .*--columns prompt=question,completion=answer"):
        layout(["a", "b"])


def turns(format, fields, **columns):
    return conversations(Row(fields, "my.jsonl row 3"), Layout(format, columns))


def test_alpaca_with_and_without_input():
    columns = {"instruction": "instruction", "output": "output", "input": "input"}
    row = {"instruction": " sum ", "input": "1 2", "output": "3 "}
    assert turns("alpaca", row, **columns) == [(Turn("user", " sum ", "1 2"), Turn("assistant", "3 "))]
    for nothing in ("", " \n", None, float("nan")):
        assert turns("alpaca", row | {"input": nothing}, **columns)[0][0] == Turn("user", " sum ")
    del columns["input"]
    assert turns("alpaca", row, **columns)[0][0] == Turn("user", " sum ")


def test_self_instruct_gives_a_sample_per_instance():
    row = {"instruction": "i", "instances": [{"input": "", "output": "a"}, {"input": "b", "output": "c"}]}
    assert turns("alpaca", row, instruction="instruction", output="instances") == [
        (Turn("user", "i"), Turn("assistant", "a")),
        (Turn("user", "i", "b"), Turn("assistant", "c")),
    ]


def test_sharegpt_roles():
    speakers = ["system", "human", "gpt", "user", "function_call", "observation", "assistant", "tool"]
    row = {"conversations": [{"from": speaker, "value": str(n)} for n, speaker in enumerate(speakers)]}
    (said,) = turns("sharegpt", row, conversations="conversations")
    assert [turn.role for turn in said] == [
        *("system", "user", "assistant", "user", "assistant", "tool", "assistant", "tool"),
    ]
    assert [turn.text for turn in said if turn.trained] == ["2", "4", "6"]


def test_messages_with_parts_tool_calls_and_an_empty_system():
    call = {"function": {"name": "f", "arguments": {"x": "é"}}}
    row = {
        "messages": [
            {"role": "system", "content": ""},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "value": "b"}, "c"]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": 7},
            {"role": "assistant", "content": "done", "tool_calls": []},
        ]
    }
    assert turns("messages", row, messages="messages") == [
        (
            Turn("user", "a\nb\nc"),
            Turn("assistant", '{"function": {"name": "f", "arguments": {"x": "é"}}}'),
            Turn("tool", "7"),
            Turn("assistant", "done"),
        )
    ]


def test_numbers_are_written_out():
    assert conversations(Row({"q": 6.5, "a": 42}, "row 1"), PAIR) == [(Turn("prompt", "6.5"), Turn("completion", "42"))]
    assert text_of(Row({"t": "x"}, "row 1"), Layout("text", {"text": "t"})) == "x"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "row 3: the column a is null, not text"),
        (float("nan"), "row 3: the column a is NaN, not text"),
        (float("inf"), "row 3: the column a is inf, not text"),
        (True, "row 3: the column a is True, not text"),
        (["x"], "row 3: the column a is ['x'], not text"),
        ({"x": "y" * 90}, "row 3: the column a is {'x': 'yyyyyy"),
        ("", "row 3: the column a is empty"),
        (" \n", "row 3: the column a is empty"),
        ("\ud83d", "row 3: the column a holds half a surrogate pair"),
    ],
)
def test_a_value_that_is_no_text_is_named_with_row_and_column(value, message):
    with pytest.raises(InputError) as error:
        conversations(Row({"q": "fine", "a": value}, "my.jsonl row 3"), PAIR)
    assert message in str(error.value)


def test_a_missing_column_of_a_later_row():
    with pytest.raises(InputError, match="row 3: the column a is null"):
        conversations(Row({"q": "fine"}, "my.jsonl row 3"), PAIR)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "row 3: the column messages should be a list of objects and is null"),
        ([], "should be a list of objects and is []"),
        ("hello", "should be a list of objects and is 'hello'"),
        (["hello"], "should be a list of objects and is ['hello']"),
        ([{"role": "narrator", "content": "x"}], "row 3, messages[0]: the speaker is 'narrator'"),
        ([{"content": "x"}], "messages[0]: the speaker is None"),
        ([{"role": ["user"], "content": "x"}], "the speaker is ['user']"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": None}], "messages[1].content is null"),
        ([{"role": "user", "content": [{"type": "image", "image": "x"}]}], "messages[0].content is {'type': 'image'"),
        ([{"role": "user", "content": " "}], "messages[0] is empty"),
        ([{"role": "assistant"}], "messages[0].content is null"),
    ],
)
def test_a_conversation_that_is_none(content, message):
    with pytest.raises(InputError) as error:
        turns("messages", {"messages": content}, messages="messages")
    assert message in str(error.value)


def test_a_bad_instance_is_named():
    row = {"instruction": "i", "instances": [{"input": "", "output": "a"}, {"input": "b", "output": None}]}
    with pytest.raises(InputError, match=r"row 3: the column instances\[1\]\.output is null"):
        turns("alpaca", row, instruction="instruction", output="instances")
