"""Tokenised sets on disk by content hash: complete and unharmed, or built again."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays

from effitrain.core.errors import InputError
from effitrain.io.atomic import atomic_folder, write_json, write_safetensors


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/effitrain/tokenized``, under ``~/.cache`` where that is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "effitrain" / "tokenized"


def load_set(folder: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]] | None:
    """Arrays and facts saved in ``folder``; None unless every byte is as it was saved."""
    try:
        record = json.loads((folder / "set.json").read_text(encoding="utf-8"))
        content = (folder / "tokens.safetensors").read_bytes()
        if record["sha256"] != _digest(content, record["facts"]):
            return None
        return load_arrays(content), record["facts"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


def save_set(folder: Path, arrays: dict[str, NDArray[Any]], facts: dict[str, Any]) -> None:
    """Write ``arrays`` and ``facts`` (JSON values) to ``folder``; where that is impossible only time is lost."""
    try:
        with atomic_folder(folder) as partial:
            tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
            write_safetensors(partial / "tokens.safetensors", tensors, {})
            content = (partial / "tokens.safetensors").read_bytes()
            write_json(partial / "set.json", {"sha256": _digest(content, facts), "facts": facts})
    except (OSError, InputError):
        return


def _digest(content: bytes, facts: dict[str, Any]) -> str:
    return hashlib.sha256(content + json.dumps(facts, sort_keys=True).encode()).hexdigest()
