"""Checkpoints of a run: complete or absent, and all that resuming bit for bit needs.

A checkpoint is ``step-N/``: the trainable tensors, the optimizer's tensors, and ``state.json``. Order of the data,
learning rate and every random choice are functions of the step, so nothing else has to be kept.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from effitrain.core.errors import InputError
from effitrain.io.atomic import atomic_folder, remove_folder, remove_stale, write_json
from effitrain.io.manifest import verify_manifest, write_manifest
from effitrain.io.writer import stream_safetensors


@dataclass
class TrainState:
    """Where training stands.

    Attributes:
        step: steps done.
        tokens: tokens that went through the model.
        seconds: time spent in steps.
        first_loss: training loss of the first step.
        last_loss: training loss of the newest step.
        round_bytes: where layers take turns, masters, gradients and states on the device at the end of each round.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    first_loss: float | None = None
    last_loss: float | None = None
    round_bytes: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds.

    Attributes:
        step: steps done.
        trainable: by name.
        optimizer: the tensors of its state, by path.
        facts: the rest, as JSON values.
        own: whether the tensors are copies in host memory, so that training may go on while they are written; else they
            are the very ones that train, wherever they are.
    """

    step: int
    trainable: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    facts: dict[str, Any]
    own: bool


def snapshot(
    state: TrainState, trainable: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, most: int = 0
) -> Snapshot:
    """All that resuming needs.

    Args:
        state: where training stands.
        trainable: by name.
        optimizer: its parameters in the order of ``trainable``, which may hold more tensors behind them.
        most: bytes up to which all of it is in memory of its own.
    """
    tensors, scalars = _split(optimizer.state_dict()["state"])
    weights = {name: tensor.detach() for name, tensor in trainable.items()}
    own = sum(tensor.nbytes for tensor in (*weights.values(), *tensors.values())) <= most
    if own:
        weights, tensors = ({n: t.to("cpu", copy=True) for n, t in held.items()} for held in (weights, tensors))
    return Snapshot(state.step, weights, tensors, {**asdict(state), "optimizer": scalars}, own)


def write_checkpoint(folder: Path, taken: Snapshot, keep: int) -> Path:
    """Write ``folder/step-N`` and remove all but the newest ``keep``.

    Raises:
        InputError: the place cannot be written.
    """
    target = folder / f"step-{taken.step}"
    with atomic_folder(target) as tmp:
        _write(tmp / "trainable.safetensors", taken.trainable)
        _write(tmp / "optimizer.safetensors", taken.optimizer)
        write_json(tmp / "state.json", taken.facts)
        write_manifest(tmp)
    remove_stale(folder)
    for old in checkpoints(folder)[:-keep]:
        remove_folder(old)
    return target


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One tensor after the other is brought to the host, where the plan leaves no room for all at once."""
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    stream_safetensors(path, layout, lambda name: tensors[name].cpu())


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in ``folder``, oldest first."""
    found = [p for p in folder.glob("step-*") if p.is_dir() and p.name.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def remove_after(folder: Path, step: int) -> None:
    """Remove the checkpoints of steps after ``step``, and what killed writers left."""
    if folder.is_dir():
        remove_stale(folder)
    for path in checkpoints(folder):
        if int(path.name.removeprefix("step-")) > step:
            remove_folder(path)


def check_checkpoint(folder: Path) -> None:
    """Refuse what is no checkpoint, without reading one.

    Raises:
        InputError: it is none.
    """
    if not (folder / "state.json").is_file():
        raise InputError(
            f"{folder} is not a checkpoint: it has no state.json.",
            next_step="Name a step-N folder in the checkpoints of a run.",
        )


def step_of(folder: Path) -> int:
    """The step that a checkpoint was saved after.

    Raises:
        InputError: it is no checkpoint, or damaged.
    """
    check_checkpoint(folder)
    try:
        return int(json.loads((folder / "state.json").read_text(encoding="utf-8"))["step"])
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{folder} is damaged: state.json cannot be read.", next_step="Copy it again.") from None


def load_checkpoint(folder: Path, trainable: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> TrainState:
    """Restore weights and optimizer in place from one checkpoint.

    Raises:
        InputError: a file is missing, changed or of another run.
    """
    check_checkpoint(folder)
    verify_manifest(folder)
    weights = load_file(folder / "trainable.safetensors")
    kept, here = ({n: tuple(t.shape) for n, t in tensors.items()} for tensors in (weights, trainable))
    if kept != here:
        differing = sorted(kept.items() ^ here.items())
        raise InputError(
            f"The checkpoint {folder} holds other trainable tensors than this run, such as {differing[0][0]}.",
            "It is of a run with another model, --method, --lora-r or --lora-targets.",
            "Name a checkpoint of this run with --resume, or go on from an adapter with --init-adapter.",
        )
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(weights[name])
    raw = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    state = _join({**load_file(folder / "optimizer.safetensors"), **raw.pop("optimizer")})
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return TrainState(**raw)


def _split(state: Mapping[Any, Any], path: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Nested optimizer state as tensors and as plain values, both by their path, parameter number first."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for key, value in state.items():
        here = f"{path}/{key}" if path else str(key)
        if isinstance(value, Mapping):
            below = _split(value, here)
            tensors |= below[0]
            scalars |= below[1]
        elif isinstance(value, Tensor):
            tensors[here] = value.detach()
        else:
            scalars[here] = value
    return tensors, scalars


def _join(leaves: Mapping[str, Any]) -> dict[int, Any]:
    """The nested state whose leaves ``_split`` took apart."""
    state: dict[Any, Any] = {}
    for path, value in leaves.items():
        *parents, leaf = path.split("/")
        node = state
        for parent in parents:
            node = node.setdefault(int(parent) if node is state else parent, {})
        node[leaf] = value
    return state
