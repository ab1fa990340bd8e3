"""Keep maps on disk: ``keep.safetensors``, int32 indices by layer and part, sizes and base in the metadata."""

import json
from itertools import pairwise
from pathlib import Path

from effitrain.core.errors import InputError
from effitrain.core.keep import KeepMap, LayerKeep
from effitrain.io.atomic import write_safetensors

KEEP = "keep.safetensors"
_AGAIN = "Copy the file again, or prune again."
_SIZES = ("ffn", "num_heads", "num_kv_heads", "head_dim")


def write_keep(path: Path, keep: KeepMap) -> None:
    """Write ``keep`` to ``path``."""
    import torch

    tensors = {}
    for index, layer in enumerate(keep.layers):
        tensors[f"layers.{index}.ffn"] = torch.tensor(layer.ffn, dtype=torch.int32)
        tensors[f"layers.{index}.kv_heads"] = torch.tensor(layer.kv_heads, dtype=torch.int32)
    facts = {name: getattr(keep, name) for name in (*_SIZES, "base", "fingerprint")}
    write_safetensors(path, tensors, {"keep_map": json.dumps(facts)})


def read_keep(path: Path) -> KeepMap:
    """The keep map at ``path``, or in the folder of a pruned model or run at ``path``.

    Raises:
        InputError: there is none, or the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    file = path / KEEP if path.is_dir() else path
    if not file.is_file():
        raise InputError(
            f"There is no keep map {file}.",
            next_step="Name keep.safetensors of the pruned model, or the folder that it lies in.",
        )
    try:
        with safe_open(file, "pt") as content:
            facts = json.loads(content.metadata()["keep_map"])
            count = len(content.keys()) // 2
            layers = tuple(
                LayerKeep(*(tuple(content.get_tensor(f"layers.{i}.{part}").tolist()) for part in ("ffn", "kv_heads")))
                for i in range(count)
            )
        keep = KeepMap(**{name: int(facts[name]) for name in _SIZES}, layers=layers, base=str(facts["base"]),
                       fingerprint=str(facts["fingerprint"]))  # fmt: skip
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        raise InputError(f"{file} is not a keep map, or it is damaged.", next_step=_AGAIN) from None
    if not all(_ascending(x.ffn, keep.ffn) and _ascending(x.kv_heads, keep.num_kv_heads) for x in keep.layers):
        raise InputError(
            f"{file} is damaged: its indices are not ascending within the model's sizes.", next_step=_AGAIN
        )
    return keep


def _ascending(indices: tuple[int, ...], size: int) -> bool:
    inside = bool(indices) and indices[0] >= 0 and indices[-1] < size
    return inside and all(a < b for a, b in pairwise(indices))
