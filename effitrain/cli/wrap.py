"""Text in the width of a terminal: no word is torn apart, since it may be a path, and no command."""

import re
import textwrap

# Copied from the terminal, half a command would be run.
_COMMAND = re.compile(r"`[^`]*`|\beffitrain [a-z]+(?: --?[a-z][\w-]*(?: [\w./-]*\w)?)*")


def wrapped(text: str, width: int) -> str:
    """Each line of ``text`` in lines of at most ``width`` characters, where words and commands let it."""
    fill = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False).fill
    whole = _COMMAND.sub(lambda command: command[0].replace(" ", "\xa0"), text)  # which is no place to break a line
    return "\n".join(map(fill, whole.splitlines())).replace("\xa0", " ")
