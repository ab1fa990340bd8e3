"""The tokenizer of a model, from its folder; the built-in one for rehearsals of models whose files are not at hand."""

from pathlib import Path
from typing import TYPE_CHECKING

from effitrain.core.errors import InputError
from effitrain.core.presets import find_preset
from effitrain.io.hub import ModelSource
from effitrain.io.model_folder import on_disk

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_NEXT = "Put the tokenizer.json of the model, and its tokenizer_config.json, into the folder."


def load_tokenizer(source: ModelSource) -> "PreTrainedTokenizerFast":
    """The fast tokenizer of ``source``; without a folder, as under synthetic weights, that of the built-in tiny model.

    Raises:
        InputError: the folder holds none, a damaged one, or one that needs code of its own.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = source.folder or _builtin()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise _unusable(folder, error) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(f"The tokenizer in {folder} is a slow one ({type(tokenizer).__name__}).", next_step=_NEXT)
    return tokenizer


def _builtin() -> Path:
    preset = find_preset("tiny")
    assert preset is not None and preset.folder is not None
    return preset.folder


def _unusable(folder: Path, error: Exception) -> InputError:
    if "trust_remote_code" in str(error):
        return InputError(
            f"The tokenizer in {folder} brings code of its own.",
            "Code from a model's folder is never run.",
            "Use a model whose tokenizer.json stands alone.",
        )
    if (folder / "tokenizer.json").is_file():
        reason = (str(error).splitlines() or [""])[0]
        return InputError(
            f"The tokenizer in {folder} cannot be loaded: {type(error).__name__}: {reason}", next_step=_NEXT
        )
    cause = ""
    if (folder / "tokenizer.model").is_file():
        cause = "tokenizer.model alone needs the sentencepiece package, which is not installed or cannot read it."
    return InputError(f"{folder} has no tokenizer.json; {on_disk(folder)}", cause, _NEXT)
