"""From an adapter of the small model to one of the full-size model (LoRAM, Zhang et al. 2025, section 2.3).

Only files and the keep map are needed, no model. What was pruned gets no update: its frozen weights return as they are.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effitrain.adapters.base import recover
from effitrain.adapters.merge import check_fits
from effitrain.adapters.storage import AdapterBundle, read_adapter, save_adapter
from effitrain.core.keep import KeepMap
from effitrain.core.paths import path_of
from effitrain.core.positions import same_positions, with_positions_of
from effitrain.core.spec import PRUNABLE, ModelSpec
from effitrain.model.load import Base
from effitrain.pruning.small import check_base


def recover_adapter(
    source: Path, keep: KeepMap, full: Base, target: Path, positions: Mapping[str, Any] | None = None
) -> AdapterBundle:
    """Write the adapter of the small model in ``source`` to ``target`` as one of ``full``, in peft's layout.

    Where ``positions``, the config.json that the adapter was trained with, are not those of ``full``, the config.json
    of ``full`` with them lies in ``target``, too.

    Raises:
        InputError: ``full`` is not the model that was pruned, or the adapter is not one of the small model.
    """
    check_base(keep, full)
    bundle = read_adapter(source)
    factors = recover_factors(bundle, keep, full.spec)
    own = full.source.config
    scaled = with_positions_of(positions, own) if positions and not same_positions(positions, own) else None
    save_adapter(target, factors, bundle.config, full.name, keep.fingerprint, bundle.full, scaled)
    return read_adapter(target)


def recover_factors(bundle: AdapterBundle, keep: KeepMap, full: ModelSpec) -> dict[str, tuple[Tensor, Tensor]]:
    """B [out, r] and A [r, in] of the full-size model by module path: kept rows and columns hold the trained values,
    the others zeros.

    Raises:
        InputError: keep map or adapter are of another model.
    """
    keep.check(full)
    check_fits(full.resized(keep.widths), bundle)
    factors = dict(bundle.tensors)
    for layer in full.layers:
        for linear in layer.linears:
            path = path_of(layer.index, linear.name)
            if path in factors:
                axes = {"out": linear.out_axis, "in": linear.in_axis}
                sizes = {side: keep.full_size(axis) for side, axis in axes.items() if axis in PRUNABLE}
                found = {side: keep.indices(layer.index, axis) for side, axis in axes.items()}
                kept = {side: torch.tensor(indices) for side, indices in found.items() if indices is not None}
                B, A = factors[path]
                factors[path] = (
                    recover(B, ("out", "rank"), kept, sizes),
                    recover(A, ("rank", "in"), kept, sizes),
                )
    return factors
