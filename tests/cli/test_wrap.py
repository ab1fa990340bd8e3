"""Messages in the width of a terminal."""

import ast
import io
import re
import sys
from pathlib import Path

import pytest

import effitrain
from effitrain.cli.main import VERBS, main
from effitrain.cli.wrap import wrapped


@pytest.mark.parametrize(
    "whole",
    [
        "/a/folder/" + 60 * "x",
        "`effitrain run --model llama-3.1-70b --weights synthetic`",
        '`pip install "effitrain[track]"`',
        "--fit stream --max-seq-len 5824",
        "--columns prompt=question,completion=answer",
        "--model org/name@REVISION --no-packing --gpu-mem 20G",
    ],
)
def test_paths_and_commands_stay_whole(whole: str) -> None:
    for offset in range(41):
        text = f"{offset * 'a'}Take this: {whole}, or another, say --lr 1e-4.\nA second\xa0line."
        lines = wrapped(text, 60).splitlines()
        assert any(whole in line for line in lines) and lines[-1] == "A second\xa0line."
        assert not [line for line in lines if len(line) > 60 and not line.startswith(whole)]
        assert " ".join(lines[:-1]) == text.splitlines()[0]


def test_words_beside_flags_are_no_part_of_them() -> None:
    text = "--fit prune, --lr 1 or --quiet. Take --recompute layer, --fit stream and go on."
    assert max(map(len, wrapped(text, 20).splitlines())) <= 20


def test_no_message_has_a_command_in_the_open() -> None:
    """Only in backticks does it stay whole."""
    bare = re.compile(rf"(?<![`\w])(?:effitrain (?:--|(?:{'|'.join(VERBS)})\b)|pip install \"|wsl --)")
    for path in sorted(Path(effitrain.__path__[0]).rglob("*.py")):
        nodes = [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        texts = [str(n.value) for n in nodes if isinstance(n, ast.Constant) and id(n) not in docstrings]
        assert not [text for text in texts if bare.search(text)], path


@pytest.mark.parametrize("tty", [True, False])
def test_an_error_minds_the_terminal_and_is_one_line_in_a_log(
    tty: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(sys, "stderr", err := io.StringIO())
    err.isatty = lambda: tty  # type: ignore[method-assign]
    with pytest.raises(SystemExit):
        main(["plan", "--gpu", "rtx9999"])
    longest = max(map(len, err.getvalue().splitlines()))
    assert (longest <= 60) == tty and "Known: rtx3060, rtx3080," in err.getvalue()
