"""Messages in the width of a terminal."""

import io
import sys

import pytest

from effitrain.cli.main import main
from effitrain.cli.wrap import wrapped

REHEARSE = "effitrain run --model llama-3.1-70b --weights synthetic"


@pytest.mark.parametrize("whole", ["/a/folder/" + 40 * "x", REHEARSE, "`hf auth login`", "effitrain store rm NAME-4"])
def test_paths_and_commands_stay_whole(whole: str) -> None:
    lines = wrapped(f"To rehearse a run without them, take this: {whole}, and not another.\nA second line.", 40)
    assert any(whole in line for line in lines.splitlines()) and lines.endswith("\nA second line.")
    assert not [line for line in lines.splitlines() if len(line) > 40 and not line.startswith(whole)]


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
