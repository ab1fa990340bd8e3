"""Text in the width of a terminal: no word is torn apart, since it may be a path, and no command."""

import re
import textwrap

# Copied from the terminal, half a command would be run. Messages have commands in backticks, and flags beside words.
_FLAG = r"(?<![\w-])--[a-z][\w-]*(?: (?!--)[^\s`]+)?"
_COMMAND = re.compile(rf"`[^`\n]*`|{_FLAG}(?:(?<![,.;:)]) {_FLAG})*")
_KEPT = "\ue000"  # a blank that is no place to break a line, of a range that no text uses


def whole(text: str) -> str:
    """``text`` as ``wrapped`` does not tear it."""
    return text.replace(" ", _KEPT)


def wrapped(text: str, width: int) -> str:
    """Each line of ``text`` in lines of at most ``width`` characters, where words and commands let it."""
    fill = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False).fill
    kept = _COMMAND.sub(lambda command: whole(command[0]), text)
    return "\n".join(map(fill, kept.splitlines())).replace(_KEPT, " ")
