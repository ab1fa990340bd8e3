"""From the recipe's data fields to token sets: built, split, and cached by content."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from effitrain.core.recipe import Recipe
from effitrain.data.build import Built, build, check
from effitrain.data.cache import default_cache_dir, load_set, save_set
from effitrain.data.order import permutation
from effitrain.data.preview import preview
from effitrain.data.sources import Source, open_source
from effitrain.data.templates import check_template, find_template
from effitrain.data.tokenized import TokenSet, bos_of, join

_CODE_VERSION = 2  # raise it when the same rows would give other tokens
_EVAL_ROWS = 200
_SPLIT_STREAM = 2**64 - 1  # the epochs of the training order are streams 0, 1, ...


@dataclass(frozen=True)
class DataStats:
    """What became of a data set, its evaluation split included.

    Attributes:
        samples: kept, after cutting long text.
        tokens: of the kept samples.
        trained_tokens: tokens the loss counts.
        trained_share: ``trained_tokens / tokens``.
        truncated: samples that were shortened.
        dropped: samples left out: too long under ``--truncation drop``, or no trained token within the length.
        format: as found or named.
        template: its name; tokenizer is the tokenizer's own, none stands for plain text.
    """

    samples: int
    tokens: int
    trained_tokens: int
    trained_share: float
    truncated: int
    dropped: int
    format: str
    template: str


@dataclass(frozen=True)
class PreparedData:
    """Token sets ready to train and evaluate on.

    Attributes:
        train: the samples to train on.
        eval: the evaluation samples; empty where the recipe asks for none, or for less than half a row.
        stats: of the training data set.
        preview: one sample as text, the trained part between « and ».
        fingerprint: hash of the rows, the tokenizer and the settings that made the tokens.
    """

    train: TokenSet
    eval: TokenSet
    stats: DataStats
    preview: str
    fingerprint: str


def prepare_data(recipe: Recipe, tokenizer: Any, max_seq_len: int, cache_dir: Path | None = None) -> PreparedData:
    """The token sets of ``recipe``, no sample longer than ``max_seq_len`` tokens.

    Args:
        recipe: its data fields and its seed are read.
        tokenizer: a fast tokenizer of transformers.
        max_seq_len: in tokens.
        cache_dir: where tokenised sets are kept; None is the user's cache.

    Raises:
        InputError: no such data set or template, rows that cannot be used, nothing left, under 1 % trained.
    """
    template = find_template(recipe.template, tokenizer)
    sources = _sources(recipe)
    fingerprint = _fingerprint(recipe, tokenizer, max_seq_len, sources)
    folder = (cache_dir or default_cache_dir()) / fingerprint
    saved = load_set(folder)
    if saved:
        return _unpacked(*saved, fingerprint)

    built = [build(source, recipe, tokenizer, template, max_seq_len) for source in sources]
    train, held_out = _split(built, recipe)
    prepared = PreparedData(train, held_out, _stats(built[0]), preview(train, tokenizer), fingerprint)
    save_set(folder, _arrays(prepared), {"stats": asdict(prepared.stats), "preview": prepared.preview})
    return prepared


def check_data(recipe: Recipe) -> None:
    """Read the rows without tokenising them, to tell of a bad data set before a model is looked for.

    Raises:
        InputError: no such data set or template, or rows that cannot be used.
    """
    check_template(recipe.template)
    for source in _sources(recipe):
        check(source, recipe)


def _sources(recipe: Recipe) -> list[Source]:
    """The data set, and the one to evaluate on if it is named."""
    return [open_source(recipe.dataset)] + ([open_source(recipe.eval_dataset)] if recipe.eval_dataset else [])


def _fingerprint(recipe: Recipe, tokenizer: Any, max_seq_len: int, sources: list[Source]) -> str:
    settings = {
        "format",
        "columns",
        "template",
        "train_on_prompt",
        "truncation",
        "eval_fraction",
        "seed",
        "join_documents",
    }
    made_of = {
        "code": _CODE_VERSION,
        "recipe": recipe.model_dump(mode="json", include=settings),
        "max_seq_len": max_seq_len,
        "data": [(source.digest, source.running_text) for source in sources],
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "marks": [bos_of(tokenizer), tokenizer.eos_token, str(tokenizer.chat_template)],
    }
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:32]


def _split(built: list[Built], recipe: Recipe) -> tuple[TokenSet, TokenSet]:
    """Training and evaluation samples; samples of one row stay on one side."""
    everything = join(built[0].samples)
    if len(built) > 1:
        return everything, join(built[1].samples)
    held_out = _held_out(np.asarray(built[0].groups), recipe.eval_fraction, recipe.seed)
    return everything.subset(np.flatnonzero(~held_out)), everything.subset(np.flatnonzero(held_out))


def _held_out(groups: NDArray[np.int64], fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which samples are for evaluation, bool [n]: a share of the rows, rounded, at most 200 and never all."""
    rows = np.unique(groups)
    share = fraction * len(rows)
    count = min(_EVAL_ROWS, len(rows) - 1, max(round(share), int(share >= 0.5)))  # round() makes half a row none
    return np.isin(groups, rows[permutation(seed, _SPLIT_STREAM, len(rows))[:count]])


def _stats(built: Built) -> DataStats:
    tokens, trained = built.tokens, built.trained_tokens
    counts = (len(built.samples), tokens, trained, trained / tokens, built.truncated, built.dropped)
    return DataStats(*counts, built.format, built.template)


def _arrays(prepared: PreparedData) -> dict[str, NDArray[Any]]:
    sets = {"train": prepared.train, "eval": prepared.eval}
    return {f"{name}.{field}": array for name, tokens in sets.items() for field, array in vars(tokens).items()}


def _unpacked(arrays: dict[str, NDArray[Any]], facts: dict[str, Any], fingerprint: str) -> PreparedData:
    train, held_out = (
        TokenSet(arrays[f"{name}.input_ids"], arrays[f"{name}.labels"], arrays[f"{name}.offsets"])
        for name in ("train", "eval")
    )
    return PreparedData(train, held_out, DataStats(**facts["stats"]), facts["preview"], fingerprint)
