"""Rows of a source to token samples: laid out, rendered, tokenised, cut to length, counted."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from effitrain.core.errors import InputError
from effitrain.core.recipe import Recipe
from effitrain.core.units import counted
from effitrain.data.formats import Layout, Turn, conversations, find_layout, text_of
from effitrain.data.long_text import encode_texts
from effitrain.data.marks import Rendered, marks_of
from effitrain.data.sources import Row, Source
from effitrain.data.templates import Template
from effitrain.data.tokenized import Sample, bos_of, cut, encode, pieces

_LEAST_SHARE = 0.01


@dataclass(frozen=True)
class Built:
    """The samples of a data set.

    Attributes:
        samples: none longer than the sequence length, each with a trained token.
        groups: what each was made from: samples of one row have the same number, pieces of running text their own.
        truncated: samples that were shortened.
        dropped: samples left out.
        format: as found or named.
        template: its name; none for plain text.
    """

    samples: list[Sample]
    groups: list[int]
    truncated: int
    dropped: int
    format: str
    template: str

    @property
    def tokens(self) -> int:
        """Tokens of all samples."""
        return sum(len(sample.ids) for sample in self.samples)

    @property
    def trained_tokens(self) -> int:
        """Trained tokens of all samples; nothing predicts a sample's first token."""
        return sum(int(sample.trained[1:].sum()) for sample in self.samples)


def check(source: Source, recipe: Recipe) -> None:
    """Read every row without a tokenizer, to tell of a bad one early.

    Raises:
        InputError: no rows, columns that are not recognised, or a bad row.
    """
    rows, layout = _open(source, recipe)
    for row in rows:
        text_of(row, layout) if layout.format == "text" else conversations(row, layout)


def build(source: Source, recipe: Recipe, tokenizer: Any, template: Template, max_seq_len: int) -> Built:
    """Every sample of ``source``.

    Raises:
        InputError: a bad row, nothing left, or under 1 % of the tokens trained.
    """
    rows, layout = _open(source, recipe)
    if layout.format == "text":
        if recipe.join_documents:
            built = _build_joined(rows, layout, tokenizer, max_seq_len)
        else:
            built = _build_text(rows, layout, tokenizer, max_seq_len, source.running_text)
    else:
        built = _build_chats(rows, layout, recipe, tokenizer, template, max_seq_len)
    _check_trained(source.name, built, max_seq_len)
    return built


def _open(source: Source, recipe: Recipe) -> tuple[list[Row], Layout]:
    rows = source.load()
    if not rows:
        raise InputError(f"The data set {source.name} is empty.", next_step="Give one with at least one row.")
    # A column may be left out where it is empty, so those of any row count, first rows first.
    columns = {name: value for row in reversed(rows) for name, value in row.fields.items()}
    layout = find_layout(source.name, Row(columns, rows[0].where), recipe.format, recipe.columns)
    if recipe.join_documents and layout.format != "text":
        raise InputError(
            f"--join-documents is for running text, and {source.name} is {layout.format}: its samples stand apart.",
            next_step="Leave it out, or use --packing to fill rows with several samples.",
        )
    return rows, layout


def _build_text(rows: list[Row], layout: Layout, tokenizer: Any, max_seq_len: int, running: bool) -> Built:
    """Texts end in the end of sequence and are cut into as many samples as they need."""
    bos = bos_of(tokenizer)
    documents = enumerate(_documents(rows, layout, tokenizer))
    found = [(row, piece) for row, whole in documents for piece in pieces(whole, max_seq_len, bos)]
    groups = list(range(len(found))) if running else [row for row, _ in found]
    return Built([piece for _, piece in found], groups, 0, 0, "text", "none")


def _build_joined(rows: list[Row], layout: Layout, tokenizer: Any, max_seq_len: int) -> Built:
    """Texts end in the end of sequence, are laid end to end and cut into samples of exactly the length; what is left
    over is dropped, unless it is all there is.
    """
    ids = np.concatenate([document.ids for document in _documents(rows, layout, tokenizer)])
    found = list(pieces(Sample(ids, np.ones(len(ids), np.bool_)), max_seq_len, bos_of(tokenizer)))
    left_over = len(found) > 1 and len(found[-1].ids) < max_seq_len
    kept = found[:-1] if left_over else found
    return Built(kept, list(range(len(kept))), 0, int(left_over), "text", "none")


def _documents(rows: list[Row], layout: Layout, tokenizer: Any) -> Iterator[Sample]:
    marks = marks_of(tokenizer)
    texts = (text_of(row, layout) for row in rows)
    return encode_texts(tokenizer, (marks.closed(Rendered(text, ((0, len(text)),))).text for text in texts))


def _build_chats(
    rows: list[Row], layout: Layout, recipe: Recipe, tokenizer: Any, template: Template, max_seq_len: int
) -> Built:
    rendered = list(_render(rows, layout, template, recipe.train_on_prompt))
    bos = bos_of(tokenizer)
    samples, groups, truncated = [], [], 0
    for (group, _), whole in zip(rendered, encode(tokenizer, (item for _, item in rendered)), strict=True):
        kept = cut(whole, max_seq_len, recipe.truncation, bos)
        if kept is not None:
            samples.append(kept)
            groups.append(group)
            truncated += len(kept.ids) < len(whole.ids)
    return Built(samples, groups, truncated, len(rendered) - len(samples), layout.format, template.name)


def _render(
    rows: list[Row], layout: Layout, template: Template, train_on_prompt: bool
) -> Iterator[tuple[int, Rendered]]:
    """Row number and text of every sample; a conversation without an answer gives an empty one, to be dropped."""
    for number, row in enumerate(rows):
        for turns in conversations(row, layout):
            answered = _up_to_last_answer(turns)
            for item in template.render(answered, row.where) if answered else [Rendered("", ())]:
                yield number, Rendered(item.text, ((0, len(item.text)),)) if train_on_prompt else item


def _up_to_last_answer(turns: Sequence[Turn]) -> Sequence[Turn]:
    return turns[: max((i + 1 for i, turn in enumerate(turns) if turn.trained), default=0)]


def _check_trained(name: str, built: Built, max_seq_len: int) -> None:
    if not built.samples:
        raise InputError(
            f"Nothing is left of the data set {name}: {counted(built.dropped, 'sample')} dropped, none kept.",
            f"Their answers lie outside {max_seq_len} tokens, or the rows have no answer at all.",
            "Raise --max-seq-len, choose another --truncation, or check --format and --columns.",
        )
    tokens, trained = built.tokens, built.trained_tokens
    if trained < _LEAST_SHARE * tokens:
        raise InputError(
            f"Only {trained} of the {tokens} tokens of {name} ({trained / tokens:.2%}) would be trained.",
            f"The answers are very short beside their prompts, or were cut off at {max_seq_len} tokens, "
            "or --columns names the wrong ones.",
            "Check --columns and --template, use --truncation left, or train on everything with --train-on-prompt.",
        )
