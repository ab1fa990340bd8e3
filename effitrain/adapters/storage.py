"""Adapters on disk in peft's layout, which peft, vLLM and llama.cpp read: ``adapter_config.json`` and
``adapter_model.safetensors`` with keys ``base_model.model.<module path>.lora_A.weight`` and ``lora_B.weight``.

The scale of the update stays in ``adapter_config.json`` (alpha / r). Nothing here needs a model in memory.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from effitrain.adapters.base import Adapter, AdapterConfig
from effitrain.adapters.portable import one_rank
from effitrain.core.errors import InputError
from effitrain.io.atomic import atomic_folder, write_json, write_safetensors
from effitrain.io.model_folder import on_disk

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base.json"
_PREFIX = "base_model.model."
_AGAIN = "Copy the folder again from where it was made."
_PLAIN = "Use a LoRA as peft saves it, without DoRA or trained biases, or merge this one with peft itself."


@dataclass(frozen=True)
class AdapterBundle:
    """An adapter as read from disk.

    Attributes:
        config: rank, alpha and targets.
        base_model: what its ``adapter_config.json`` names as the base model.
        tensors: B [out, r] and A [r, in] in float32 by module path.
        full: norms and embedding that were trained in full, in float32 by their path.
    """

    config: AdapterConfig
    base_model: str
    tensors: Mapping[str, tuple[Tensor, Tensor]]
    full: Mapping[str, Tensor] = field(default_factory=dict)


def save_adapter(
    folder: Path,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    config: AdapterConfig,
    base_model: str,
    base_fingerprint: str | None = None,
    full: Mapping[str, Tensor] | None = None,
    positions: Mapping[str, Any] | None = None,
) -> None:
    """Write an adapter to ``folder``, complete or not at all; one already there is replaced.

    Args:
        folder: the adapter's own.
        factors: L [out, r] and R [r, in] by module path, saved as lora_B and lora_A: any low-rank kind loads as LoRA.
        config: rank and scale, the same for all.
        base_model: written down for whoever loads it.
        base_fingerprint: of the base's weights, in a file ``base.json`` where it is known.
        full: what was trained in full beside it, by path; peft loads it by ``modules_to_save``.
        positions: the config.json with the scaled positions that it was trained with, if they are not the base's own.
    """
    full = full or {}
    tensors = {f"{_PREFIX}{path}": tensor.detach().float().cpu().contiguous() for path, tensor in full.items()}
    for path, (left, right) in factors.items():
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = right.float().cpu().contiguous()
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = left.float().cpu().contiguous()
    with atomic_folder(folder) as tmp:
        write_safetensors(tmp / WEIGHTS, tensors, {"format": "pt"})
        write_json(tmp / CONFIG, _peft_config(list(factors), config, base_model, full))
        if base_fingerprint:  # peft warns of keys in its own file that it does not know
            write_json(tmp / BASE, {"name": base_model, "fingerprint": base_fingerprint})
        if positions:
            write_json(tmp / "config.json", positions)


def adapter_folder(path: str, *names: str) -> Path:
    """The adapter in a folder: the first of ``names`` and ``adapter`` inside a run folder, or the folder itself."""
    inside = [Path(path) / name for name in (*names, "adapter")]
    return next((folder for folder in inside if (folder / "adapter_config.json").is_file()), Path(path))


def read_adapter(folder: Path) -> AdapterBundle:
    """Read a LoRA adapter in peft's layout, ours or another tool's; where linears have ranks or scales of their own, in
    the form of ``one_rank``.

    Raises:
        InputError: files are missing or damaged, or the adapter is of a kind that is not a plain LoRA.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            found = on_disk(folder) if folder.is_dir() else "there is no such folder."
            raise InputError(
                f"There is no adapter in {folder}: {name} is missing; {found}",
                next_step=_model_of_run(folder)
                or f"Name a folder that holds {CONFIG} and {WEIGHTS}, or a run folder with one in it.",
            )
    try:
        raw = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise InputError(f"The adapter in {folder} is damaged: {error}", next_step=_AGAIN) from None
    _refuse_unsupported(raw, folder)
    full = _full(tensors, raw.get("modules_to_save") or ())
    pairs = _pairs({key: tensor for key, tensor in tensors.items() if _path(key) not in full}, folder)
    config = AdapterConfig(
        r=raw["r"], alpha=raw["lora_alpha"], targets=tuple(pairs), rslora=raw.get("use_rslora", False)
    )
    if raw.get("rank_pattern") or raw.get("alpha_pattern"):
        config, pairs = one_rank(pairs, lambda path, rank: _own_scaling(path, rank, config, raw, folder))
    return AdapterBundle(config, str(raw.get("base_model_name_or_path")), pairs, full)


def _model_of_run(folder: Path) -> str | None:
    """What to name instead of a run folder whose run changed the model itself; None where it is no such folder."""
    if not ((folder / "run.json").is_file() and (folder / "model" / "config.json").is_file()):
        return None
    return f"That run trained the model itself: name it with --model {folder / 'model'}, without --adapter."


def load_into(adapters: Mapping[str, Adapter], bundle: AdapterBundle, source: str) -> None:
    """Put the tensors of ``bundle`` into adapters already on a model; where scales differ, B makes up for it.

    Raises:
        InputError: the two do not name the same linears, ranks or shapes.
    """
    missing, extra = sorted(set(adapters) - set(bundle.tensors)), sorted(set(bundle.tensors) - set(adapters))
    if missing or extra:
        raise InputError(
            f"The adapter {source} does not fit this model: {len(missing)} linears have no tensors in it"
            f" and {len(extra)} of its tensors find no linear (such as {(missing + extra)[0]}).",
            "It was trained on another model or with other --lora-targets.",
            f"Name the model it was trained on, {bundle.base_model}, and the --lora-targets it has.",
        )
    for path, adapter in adapters.items():
        B, A = bundle.tensors[path]
        left, right = adapter.factors()
        if B.shape != left.shape or A.shape != right.shape:
            raise InputError(
                f"The adapter {source} has {tuple(B.shape)} x {tuple(A.shape)} at {path};"
                f" this model needs {tuple(left.shape)} x {tuple(right.shape)}.",
                next_step=f"Use --lora-r {len(A)} and the model it was trained on.",
            )
        adapter.load_factors(B * (bundle.config.scaling / adapter.scaling), A)


def _peft_config(paths: list[str], config: AdapterConfig, base_model: str, full: Iterable[str]) -> dict[str, Any]:
    in_some_layers = any("." in target for target in config.targets or ())
    targets = paths if in_some_layers else sorted({path.rpartition(".")[2] for path in paths})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": sorted({_leaf(path) for path in full}) or None,
    }


def _refuse_unsupported(raw: dict[str, Any], folder: Path) -> None:
    reasons = ["use_dora is set"] if raw.get("use_dora") else []
    if others := [name for name in raw.get("modules_to_save") or () if name != "embed_tokens" and _not_norm(name)]:
        reasons.append(f"modules_to_save names {', '.join(map(str, others))}")
    if raw.get("peft_type") != "LORA":
        reasons.append(f"peft_type is {raw.get('peft_type')}")
    if raw.get("bias", "none") != "none":
        reasons.append(f"bias is {raw['bias']}")
    if not isinstance(raw.get("r"), int) or not isinstance(raw.get("lora_alpha"), int | float):
        reasons.append("r or lora_alpha is missing")
    if reasons:
        raise InputError(f"The adapter in {folder} is not a plain LoRA: {', '.join(reasons)}.", next_step=_PLAIN)


def _own_scaling(path: str, rank: int, config: AdapterConfig, raw: Mapping[str, Any], folder: Path) -> float:
    """The factor on the update of ``path``, by the first pattern that matches, as peft takes it."""
    patterns = raw.get("alpha_pattern") or {}
    try:
        own = (alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", path))
        return replace(config, r=rank, alpha=float(next(own, config.alpha))).scaling
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise InputError(f"The alpha_pattern of {folder / CONFIG} is unreadable: {error}", next_step=_AGAIN) from None


def _pairs(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """B and A by module path."""
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        path, dot, side = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".lora_")
        if not dot or side not in ("A", "B"):
            raise InputError(
                f"{folder / WEIGHTS} holds {key}, which is not a LoRA tensor in peft's layout.", next_step=_PLAIN
            )
        sides.setdefault(path, {})[side] = tensor.to(torch.float32)
    halves = [path for path, pair in sides.items() if len(pair) < 2]
    if halves or not sides:
        raise InputError(
            f"{folder / WEIGHTS} has no complete pair of lora_A and lora_B at {(halves or ['any path'])[0]}.",
            next_step=_AGAIN,
        )
    return {path: (pair["B"], pair["A"]) for path, pair in sides.items()}


def _full(tensors: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """The weights of the modules that ``names`` end, as peft matches them."""
    found = {_path(key): tensor for key, tensor in tensors.items() if ".lora_" not in key}
    return {path: t.to(torch.float32) for path, t in found.items() if path.removesuffix(".weight").endswith((*names,))}


def _path(key: str) -> str:
    return key.removeprefix(_PREFIX)


def _leaf(path: str) -> str:
    """The module that a weight's path names: ``norm`` of ``model.norm.weight``."""
    return path.removesuffix(".weight").rpartition(".")[2]


def _not_norm(name: object) -> bool:
    return not (isinstance(name, str) and name.endswith("norm"))
