import pytest

from effitrain.core.errors import InputError
from effitrain.data.formats import Turn
from effitrain.data.marks import Marks, Rendered, marks_of
from effitrain.data.templates import STYLES, find_template, stop_ids

DIALOGUE = (
    Turn("system", "Be brief."),
    Turn("user", "Sum.", "1 2"),
    Turn("assistant", '{"call"}'),
    Turn("tool", "3"),
    Turn("assistant", " It is 3.\n"),
)


def marked(template, turns):
    """The rendered text with trained spans between « and »."""
    (sample,) = template.render(turns, "row 1")
    text = sample.text
    for start, end in reversed(sample.trained):
        text = f"{text[:start]}«{text[start:end]}»{text[end:]}"
    return text


def test_plain_is_alpacas_layout(tokenizer):
    plain = find_template("plain", tokenizer)
    assert marked(plain, (Turn("user", "Sum.", "1 2"), Turn("assistant", "3"))) == (
        "### Instruction:\nSum.\n\n### Input:\n1 2\n\n### Response:\n«3</s>»"
    )
    assert marked(plain, (Turn("user", "Hi."), Turn("assistant", "Hello."))) == (
        "### Instruction:\nHi.\n\n### Response:\n«Hello.</s>»"
    )


def test_plain_with_every_role(tokenizer):
    assert marked(find_template("plain", tokenizer), DIALOGUE) == (
        'Be brief.\n\n### Instruction:\nSum.\n\n### Input:\n1 2\n\n### Response:\n«{"call"}</s>»'
        "### Tool:\n3\n\n### Response:\n« It is 3.\n</s>»"
    )


@pytest.mark.parametrize(
    ("prompt", "completion", "text"),
    [
        ("2 + 2 = ?", "4", "2 + 2 = ?\n«4</s>»"),
        ("def f():\n", "    pass\n", "def f():\n«    pass\n</s>»"),
        ("The sky is", " blue", "The sky is« blue</s>»"),
        ("The sky is ", "blue", "The sky is «blue</s>»"),
    ],
)
def test_plain_pairs_have_no_headings(tokenizer, prompt, completion, text):
    plain = find_template("plain", tokenizer)
    assert marked(plain, (Turn("prompt", prompt), Turn("completion", completion))) == text


def test_none_adds_the_end_alone(tokenizer):
    template = find_template("none", tokenizer)
    assert marked(template, (Turn("prompt", "Q: 1+1\nA:"), Turn("completion", " 2"))) == "Q: 1+1\nA:« 2</s>»"
    assert template.prompt([Turn("user", "Once upon a time")]) == "Once upon a time"


def test_chatml(make_tokenizer):
    template = find_template("chatml", make_tokenizer(("<|im_start|>", "<|im_end|>")))
    assert marked(template, DIALOGUE) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nSum.\n\n1 2<|im_end|>\n"
        '<|im_start|>assistant\n«{"call"}<|im_end|>\n»'
        "<|im_start|>tool\n3<|im_end|>\n"
        "<|im_start|>assistant\n« It is 3.\n<|im_end|>\n»"
    )
    assert marked(template, (Turn("prompt", "q"), Turn("completion", "a"))) == (
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n«a<|im_end|>\n»"
    )


def test_llama3(make_tokenizer):
    template = find_template("llama3", make_tokenizer(("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")))
    assert marked(template, DIALOGUE) == (
        "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nSum.\n\n1 2<|eot_id|>"
        '<|start_header_id|>assistant<|end_header_id|>\n\n«{"call"}<|eot_id|>»'
        "<|start_header_id|>ipython<|end_header_id|>\n\n3<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n« It is 3.\n<|eot_id|>»"
    )


def test_an_end_mark_that_the_tokenizer_does_not_know_is_followed_by_one_it_knows(tokenizer):
    text = marked(find_template("chatml", tokenizer), (Turn("user", "q"), Turn("assistant", "a")))
    assert text.endswith("«a<|im_end|>\n</s>»")


@pytest.mark.parametrize("name", list(STYLES))
@pytest.mark.parametrize("pair", [("user", "assistant"), ("prompt", "completion")])
def test_the_prompt_is_how_the_sample_begins(tokenizer, name, pair):
    template = find_template(name, tokenizer)
    turns = (Turn(pair[0], "A question"), Turn(pair[1], "An answer"))
    (sample,) = template.render(turns, "row 1")
    assert template.prompt(turns[:1]) == sample.text[: sample.trained[0][0]]
    assert template.prompt(()) == find_template(name, tokenizer).prompt([])


def test_stop_ids(tokenizer, make_tokenizer):
    assert stop_ids(find_template("plain", tokenizer), tokenizer) == {tokenizer.eos_token_id}
    chat = make_tokenizer(("<|im_start|>", "<|im_end|>"))
    expected = set(chat.convert_tokens_to_ids(["</s>", "<|im_end|>"]))
    assert stop_ids(find_template("chatml", chat), chat) == expected
    assert stop_ids(find_template("chatml", tokenizer), tokenizer) == {tokenizer.eos_token_id}


def test_auto_without_a_chat_template_is_plain(tokenizer):
    assert find_template("auto", tokenizer).name == "plain"


def test_an_unknown_template(tokenizer):
    with pytest.raises(InputError, match=r"no template 'vicuna'.\nUse --template auto, plain, chatml, llama3, none"):
        find_template("vicuna", tokenizer)


def test_a_tokenizer_without_an_end(make_tokenizer):
    endless = make_tokenizer()
    endless.eos_token = None
    with pytest.raises(InputError, match="no end-of-sequence token"):
        find_template("plain", endless)


def test_marks_are_the_special_tokens_only(make_tokenizer):
    tokenizer = make_tokenizer(("<|end|>",))
    tokenizer.add_tokens(["</b>"])
    marks = marks_of(tokenizer)
    assert set(marks.special) == {"<s>", "</s>", "<|end|>"}
    assert marks.closed(Rendered("x</b>", ((0, 5),))) == Rendered("x</b></s>", ((0, 9),))


def test_a_sample_is_closed_once():
    marks = Marks("</s>", ("</s>", "<|end|>"))
    for text in ("a</s>", "a<|end|>\n"):
        assert marks.closed(Rendered(text, ((0, len(text)),))).text == text
    assert marks.closed(Rendered("ab", ((0, 1), (1, 2)))) == Rendered("ab</s>", ((0, 1), (1, 6)))
    assert marks.closed(Rendered("", ())) == Rendered("", ())
