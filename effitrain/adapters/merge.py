"""Merge an adapter into the original 16-bit shards, one tensor in memory at a time.

Merging into NF4 would throw most of a small update away; the result is always a full-precision model folder.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effitrain.adapters.full import check_full
from effitrain.adapters.storage import AdapterBundle
from effitrain.core.errors import InputError
from effitrain.core.paths import EMBEDDING, HEAD
from effitrain.core.spec import ModelSpec
from effitrain.io.atomic import atomic_folder, write_json
from effitrain.io.checkpoint import Checkpoint
from effitrain.io.model_folder import copy_companions
from effitrain.io.writer import SHARD_BYTES, write_shards


def check_fits(spec: ModelSpec, bundle: AdapterBundle) -> None:
    """Refuse an adapter of another model.

    Raises:
        InputError: the adapter changes a linear that the model does not have, or has in another shape.
    """
    linears = {**spec.linears, "lm_head": spec.head}
    shapes = {path: (linear.out_features, linear.in_features) for path, linear in linears.items()}
    for path, (B, A) in bundle.tensors.items():
        if shapes.get(path) != (B.shape[0], A.shape[1]):
            raise InputError(
                f"The adapter changes {path} of shape {(B.shape[0], A.shape[1])};"
                f" {spec.name} has {shapes.get(path, 'no such linear')}.",
                "It was trained on another model.",
                f"Name the model it was trained on: {bundle.base_model}.",
            )
    check_full(spec, bundle.full)


def merge(
    source: Path,
    weights: Checkpoint,
    bundle: AdapterBundle,
    target: Path,
    config: Mapping[str, Any],
    dtype: torch.dtype = torch.bfloat16,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[str], None] = lambda name: None,
) -> None:
    """Write ``weights`` plus the adapter's update to ``target`` as a complete model folder.

    Args:
        source: the model folder, for its tokenizer.
        weights: its tensors.
        bundle: the adapter, which ``check_fits``.
        target: written complete or not at all.
        config: the config.json that it gets, with the positions that the adapter was trained with.
        dtype: of the merged tensors; the sum is formed in float32.
        shard_bytes: largest size of a file.
        progress: told each tensor's name.

    Raises:
        InputError: the base is quantised.
    """
    names = weights.names()
    if any(weights.is_nf4(name) for name in names):
        raise InputError(
            f"{source} is stored in NF4.",
            "Merging into 4 bits would lose most of the update.",
            "Name the original 16-bit model with --model.",
        )
    apart = "lm_head" in bundle.tensors or EMBEDDING in bundle.full  # the head is no longer the tied embedding
    if apart and HEAD not in names:
        names.append(HEAD)
    with atomic_folder(target) as tmp:
        layout = {name: (dtype, tuple(weights.shape(name))) for name in names}
        write_shards(tmp, layout, lambda name: _merged(weights, bundle, name, dtype, progress), shard_bytes)
        copy_companions(source, tmp)
        _write_config(config, tmp, dtype, untie=apart)


def _merged(
    weights: Checkpoint, bundle: AdapterBundle, name: str, dtype: torch.dtype, progress: Callable[[str], None]
) -> Tensor:
    progress(name)
    if name in bundle.full:
        return bundle.full[name].to(dtype)
    tensor = weights.read(name)
    path = name.removesuffix(".weight")
    if path in bundle.tensors:
        B, A = bundle.tensors[path]
        tensor = tensor.float().addmm_(B, A, alpha=bundle.config.scaling)
    return tensor.to(dtype)


def _write_config(config: Mapping[str, Any], target: Path, dtype: torch.dtype, untie: bool) -> None:
    kept = {key: value for key, value in config.items() if key != "torch_dtype"}
    kept["dtype"] = str(dtype).removeprefix("torch.")
    if untie:
        kept["tie_word_embeddings"] = False
    write_json(target / "config.json", kept)
