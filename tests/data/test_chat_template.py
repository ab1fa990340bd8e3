"""Templates in the manner of well-known models, each with one habit that makes answers hard to find."""

import pytest

from effitrain.core.errors import InputError
from effitrain.data.formats import Turn
from effitrain.data.templates import find_template, stop_ids
from effitrain.data.tokenized import encode

MARKS = ("<|user|>", "<|model|>", "<|end|>")

# Trims what is said.
TRIMS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|model|>' if m.role == 'assistant' "
    "else m.role }}\n{{ m.content | trim }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|model|>\n{% endif %}"
)
# Ends the whole conversation, but not its beginnings, in the end of sequence.
ENDS = (
    "{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|model|>' }}{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|model|>{% else %}{{ eos_token }}{% endif %}"
)
# Ends only the last answer.
LAST = (
    "{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|model|>' }}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|model|>{% else %}<|end|>{% endif %}"
)
# Writes an empty block of thoughts before the last answer only.
THINKS = (
    "{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|model|>' }}"
    "{{ '<think></think>' if loop.last and m.role == 'assistant' }}{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|model|>{% endif %}"
)
# Opens thoughts in the generation prompt, and leaves them out of the answers.
OPENS = (
    "{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|model|>' }}"
    "{{ m.content.split('</think>')[-1] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|model|><think>\n{% endif %}"
)
# Knows no generation prompt and no end mark.
BARE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TRIMS
# Drops the system's words, and what a tool says is JSON.
DROPS = (
    "{% for m in messages %}{% if m.role == 'tool' %}<|user|>{{ m.content | tojson }}<|end|>"
    "{% elif m.role != 'system' %}{{ '<|user|>' if m.role == 'user' else '<|model|>' }}{{ m.content }}<|end|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|model|>{% endif %}"
)
# Writes the system's words into the last prompt.
MOVES = (
    "{% set system = messages[0].content %}{% for m in messages[1:] %}{% if m.role == 'user' %}<|user|>"
    "{{ system if loop.last or not add_generation_prompt }}{{ m.content }}{% else %}<|model|>{{ m.content }}<|end|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|model|>{% endif %}"
)

U, A = (lambda text: Turn("user", text)), (lambda text: Turn("assistant", text))
TWICE = (U("q1"), A(" a1 <b>\n"), U("q2"), A("a2"))


@pytest.fixture
def chat(make_tokenizer):
    """``chat(template)``: a tokenizer with this chat template."""

    def make(template):
        tokenizer = make_tokenizer(MARKS)
        tokenizer.chat_template = template
        return tokenizer

    return make


def marked(tokenizer, turns):
    texts = []
    for sample in find_template("auto", tokenizer).render(turns, "my.jsonl row 3"):
        text = sample.text
        for start, end in reversed(sample.trained):
            text = f"{text[:start]}«{text[start:end]}»{text[end:]}"
        texts.append(text)
    return texts


@pytest.mark.parametrize(
    ("template", "texts"),
    [
        (TRIMS, ["<s><|user|>\nq1<|end|>\n<|model|>\n«a1 <b><|end|>\n»<|user|>\nq2<|end|>\n<|model|>\n«a2<|end|>\n»"]),
        (ENDS, ["<|user|>q1<|end|><|model|>« a1 <b>\n<|end|>»<|user|>q2<|end|><|model|>«a2<|end|></s>»"]),
        (LAST, ["<|user|>q1<|model|>« a1 <b>\n<|end|>»", "<|user|>q1<|model|> a1 <b>\n<|user|>q2<|model|>«a2<|end|>»"]),
        (
            THINKS,
            [
                "<|user|>q1<|end|><|model|>«<think></think> a1 <b>\n<|end|>»",
                "<|user|>q1<|end|><|model|> a1 <b>\n<|end|><|user|>q2<|end|><|model|>«<think></think>a2<|end|>»",
            ],
        ),
        (OPENS, ["<|user|>q1<|end|><|model|>« a1 <b>\n<|end|>»<|user|>q2<|end|><|model|>«a2<|end|>»"]),
        (BARE, ["user: q1\n«assistant:  a1 <b>\n\n»user: q2\n«assistant: a2\n</s>»"]),
    ],
)
def test_answers_are_found_with_their_end(chat, template, texts):
    assert marked(chat(template), TWICE) == texts


def test_an_answer_before_any_question(chat):
    assert marked(chat(TRIMS), (A("Welcome."), *TWICE[2:])) == [
        "<s><|model|>\n«Welcome.<|end|>\n»<|user|>\nq2<|end|>\n<|model|>\n«a2<|end|>\n»"
    ]


def test_pairs_and_inputs_are_user_and_assistant(chat):
    expected = ["<|user|>Sum.\n\n1 2<|end|><|model|>«3<|end|></s>»"]
    assert marked(chat(ENDS), (Turn("user", "Sum.", "1 2"), A("3"))) == expected
    assert marked(chat(ENDS), (Turn("prompt", "Sum.\n\n1 2"), Turn("completion", "3"))) == expected


def test_tools_are_context(chat):
    turns = (U("q"), A("call"), Turn("tool", '"r"'), A("done"))
    assert marked(chat(DROPS), turns) == [
        '<|user|>q<|end|><|model|>«call<|end|>»<|user|>"\\"r\\""<|end|><|model|>«done<|end|>»'
    ]


@pytest.mark.parametrize(
    ("template", "turns", "message"),
    [
        (REFUSES, (Turn("system", "s"), *TWICE), "refuses turns of system, user, assistant: System role not supported"),
        ("{{ messages[7].content }}", TWICE, "refuses turns of user, assistant: "),
        ("{{ 1 + messages[0].content }}", TWICE, "refuses turns of user, assistant: unsupported operand"),
        ("{% if", TWICE, "refuses turns of user, assistant: "),
        (DROPS, (Turn("system", "unseen"), *TWICE), "leaves out or changes what the system says"),
        (OPENS, (U("q"), A("<think>so</think>a")), "leaves out or changes what the assistant says"),
        (
            MOVES,
            (Turn("system", "s"), U("q1"), A("a1"), U("q2"), A("a2")),
            "does not write the turns one after the other",
        ),
    ],
)
def test_a_template_that_cannot_render_the_conversation(chat, template, turns, message):
    with pytest.raises(InputError) as error:
        marked(chat(template), turns)
    assert str(error.value).startswith("my.jsonl row 3: the tokenizer's chat template ")
    assert message in str(error.value)
    assert "--template plain" in str(error.value)


def test_tokens_decode_to_the_text_and_trained_ones_to_the_spans(chat):
    for template in (TRIMS, ENDS, THINKS, OPENS, BARE):
        tokenizer = chat(template)
        samples = find_template("auto", tokenizer).render(TWICE, "row 1")
        for sample, tokens in zip(samples, encode(tokenizer, samples), strict=True):
            bos = "" if sample.text.startswith("<s>") else "<s>"
            assert tokenizer.decode(tokens.ids) == bos + sample.text
            spans = "".join(sample.text[start:end] for start, end in sample.trained)
            assert tokenizer.decode(tokens.ids[tokens.trained]) == spans
            assert list(tokens.ids).count(tokenizer.bos_token_id) == 1


def test_the_prompt_of_a_chat(chat):
    tokenizer = chat(TRIMS)
    template = find_template("auto", tokenizer)
    assert template.name == "tokenizer"
    assert template.prompt([U(" q ")]) == "<s><|user|>\nq<|end|>\n<|model|>\n"
    assert stop_ids(template, tokenizer) == set(tokenizer.convert_tokens_to_ids(["</s>", "<|end|>"]))
