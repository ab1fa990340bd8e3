"""How rows are laid out: which format a data set has, and each row as turns of a conversation."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from effitrain.core.errors import InputError
from effitrain.data.sources import Row

# For each format the roles it needs, and for each role the usual column names, the first found wins.
_NEEDED: dict[str, dict[str, tuple[str, ...]]] = {
    "alpaca": {"instruction": ("instruction",), "output": ("output", "response", "instances")},
    "sharegpt": {"conversations": ("conversations", "conversation")},
    "messages": {"messages": ("messages",)},
    "prompt-completion": {"prompt": ("prompt", "question"), "completion": ("completion", "response", "answer")},
    "text": {"text": ("text",)},
}
_OPTIONAL = {"alpaca": {"input": ("input", "context")}}

# Speakers as data sets name them, and their role here.
_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "tool_response", "function_response"), "tool"),
}


@dataclass(frozen=True)
class Turn:
    """What one speaker says.

    Attributes:
        role: system, user, assistant, tool; prompt and completion for pairs that are no conversation.
        text: as in the data, not stripped.
        input: material that belongs to an alpaca instruction.
    """

    role: str
    text: str
    input: str = ""

    @property
    def trained(self) -> bool:
        """Whether the model learns to say this."""
        return self.role in ("assistant", "completion")


@dataclass(frozen=True)
class Layout:
    """A format, and for each of its roles the column that holds it."""

    format: str
    columns: Mapping[str, str]


def find_layout(name: str, first: Row, wanted: str, columns: Mapping[str, str] | None) -> Layout:
    """The layout of data set ``name`` from the columns of its first row.

    Args:
        name: of the data set, for messages.
        first: its first row.
        wanted: a format, or auto.
        columns: role to column, for columns with unusual names; only formats with these roles are considered.

    Raises:
        InputError: no format or several match, an unknown role, or a column that is not there.
    """
    columns = columns or {}
    formats = [format for format in _NEEDED if wanted in ("auto", format)]
    candidates = [format for format in formats if columns.keys() <= _aliases(format).keys()]
    if not candidates:
        roles = "; ".join(f"{format} has {', '.join(_aliases(format))}" for format in formats)
        raise InputError(
            f"--columns names {', '.join(columns)}, which no format has together.",
            next_step=f"Use the names of one: {roles}.",
        )
    absent = [column for column in columns.values() if column not in first.fields]
    if absent:
        raise _no_layout(name, first, f"and none called {', '.join(absent)}")
    matches = [layout for layout in (_match(format, first, columns) for format in candidates) if layout]
    if len(matches) > 1:  # many sets repeat the whole sample in a column called text
        matches = [layout for layout in matches if layout.format != "text"]
    if len(matches) != 1:
        several = " and ".join(layout.format for layout in matches)
        which = f"which is not {wanted}" if wanted != "auto" else "and no known format has these"
        raise _no_layout(name, first, f"which fit both {several}" if matches else which)
    return matches[0]


def _aliases(format: str) -> dict[str, tuple[str, ...]]:
    return _NEEDED[format] | _OPTIONAL.get(format, {})


def _match(format: str, first: Row, columns: Mapping[str, str]) -> Layout | None:
    usual = {role: next((c for c in names if c in first.fields), None) for role, names in _aliases(format).items()}
    found = {role: column for role, column in (usual | dict(columns)).items() if column is not None}
    return Layout(format, found) if found.keys() >= _NEEDED[format].keys() else None


def _no_layout(name: str, first: Row, problem: str) -> InputError:
    return InputError(
        f"The data set {name} has the columns {', '.join(map(str, first.fields)) or '(none)'}, {problem}.",
        next_step="Say which with --format (alpaca, sharegpt, messages, prompt-completion, text) "
        "or name them: --columns prompt=question,completion=answer.",
    )


def conversations(row: Row, layout: Layout) -> list[tuple[Turn, ...]]:
    """The samples in ``row``, each as turns; several for a Self-Instruct row with several instances.

    Raises:
        InputError: a needed column is missing, null, NaN, empty, or not text; names row and column.
    """
    return list(_READERS[layout.format](row, layout.columns))


def text_of(row: Row, layout: Layout) -> str:
    """The text of a row of the ``text`` format."""
    return _text(row, layout.columns["text"])


def _alpaca(row: Row, columns: Mapping[str, str]) -> Iterator[tuple[Turn, ...]]:
    instruction, output = _text(row, columns["instruction"]), columns["output"]
    if not isinstance(row.fields.get(output), list):
        yield _alpaca_turns(row, instruction, row.fields.get(columns.get("input", "")), output)
        return
    for number, instance in enumerate(_items(row, output)):
        inner = Row({f"{output}[{number}].{key}": value for key, value in instance.items()}, row.where)
        yield _alpaca_turns(inner, instruction, instance.get("input"), f"{output}[{number}].output")


def _alpaca_turns(row: Row, instruction: str, extra: Any, output: str) -> tuple[Turn, ...]:
    extra = "" if extra is None or (isinstance(extra, float) and math.isnan(extra)) else str(extra)
    return Turn("user", instruction, extra if extra.strip() else ""), Turn("assistant", _text(row, output))


def _pair(row: Row, columns: Mapping[str, str]) -> Iterator[tuple[Turn, ...]]:
    yield Turn("prompt", _text(row, columns["prompt"])), Turn("completion", _text(row, columns["completion"]))


def _sharegpt(row: Row, columns: Mapping[str, str]) -> Iterator[tuple[Turn, ...]]:
    yield _chat(row, columns["conversations"])


def _messages(row: Row, columns: Mapping[str, str]) -> Iterator[tuple[Turn, ...]]:
    yield _chat(row, columns["messages"])


_READERS: dict[str, Callable[[Row, Mapping[str, str]], Iterator[tuple[Turn, ...]]]] = {
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "messages": _messages,
    "prompt-completion": _pair,
}


def _chat(row: Row, column: str) -> tuple[Turn, ...]:
    """Turns of a list of ``{"from", "value"}`` or ``{"role", "content"}``; empty system turns are left out."""
    turns = []
    for number, message in enumerate(_items(row, column)):
        place = f"{column}[{number}]"
        speaker = next((message[key] for key in ("role", "from") if key in message), None)
        if not isinstance(speaker, str) or speaker not in _ROLES:
            raise InputError(
                f"{row.where}, {place}: the speaker is {speaker!r}.", next_step=f"Known are {', '.join(_ROLES)}."
            )
        text = _content(row, place, message)
        if text.strip() or _ROLES[speaker] != "system":
            turns.append(Turn(_ROLES[speaker], _filled(row, place, text)))
    return tuple(turns)


def _content(row: Row, place: str, message: Mapping[str, Any]) -> str:
    """The text of a message: a string or a list of parts, then its tool calls as JSON, a line each."""
    key = next((key for key in ("content", "value", "text") if key in message), "content")
    content, calls = message.get(key), message.get("tool_calls") or []
    parts = content if isinstance(content, list) else [content] if content is not None or not calls else []
    texts = [_part(row, f"{place}.{key}", part) for part in parts]
    return "\n".join([*texts, *(json.dumps(call, ensure_ascii=False) for call in calls)])


def _part(row: Row, place: str, part: Any) -> str:
    if isinstance(part, dict):
        part = next((part[key] for key in ("text", "value") if key in part), part)
    return _string(row, place, part)


def _items(row: Row, column: str) -> list[dict[str, Any]]:
    items = row.fields.get(column)
    if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
        raise InputError(
            f"{row.where}: the column {column} should be a list of objects and is {_shown(items)}.",
            next_step="Mend or remove the row.",
        )
    return items


def _text(row: Row, column: str) -> str:
    return _filled(row, column, _string(row, column, row.fields.get(column)))


def _filled(row: Row, column: str, text: str) -> str:
    if not text.strip():
        raise InputError(f"{row.where}: the column {column} is empty.", next_step="Fill or remove the row.")
    return text


def _string(row: Row, column: str, value: Any) -> str:
    """``value`` as text; finite numbers are written out."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    if not isinstance(value, str):
        raise InputError(
            f"{row.where}: the column {column} is {_shown(value)}, not text.", next_step="Fill or remove the row."
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{row.where}: the column {column} holds half a surrogate pair, not text.",
            next_step="Mend or remove the row.",
        ) from None
    return value


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    text = "NaN" if value != value else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
