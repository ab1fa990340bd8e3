"""How wide each layer of a pruned model is, from configuration and ratio alone (LoRAM, Zhang et al. 2025).

The ratio is meant for each pruned part of the layers that are not exempt; hidden size, embedding, head and norms stay.
"""

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

from effitrain.core.errors import InputError
from effitrain.core.recipe import Recipe
from effitrain.core.spec import Axis, ModelSpec, Widths, spec_from_config

PARTS = ("ffn+kv", "ffn", "kv")
CUT_FACTS = "prune.json"  # beside a small model: what it was made of
# LoRAM leaves the first 4 and last 2 of 80 layers whole; other depths in proportion.
_EXEMPT_FIRST, _EXEMPT_LAST = Fraction(4, 80), Fraction(2, 80)
# Tensor cores and NF4 want rows in multiples of 64 and more; 256 changes a 70B model's size by less than 2 %.
_MULTIPLE, _LEAST_STEPS = 256, 8


def cut_spec(
    spec: ModelSpec,
    ratio: float,
    parts: str = "ffn+kv",
    exempt: tuple[int, int] | None = None,
    multiple: int | None = None,
) -> ModelSpec:
    """The shape of ``spec`` after pruning.

    Args:
        spec: of the full-size model.
        ratio: share of each part that goes, from 0 to below 1.
        parts: what is pruned, of ``PARTS``.
        exempt: first and last layers left whole; ``default_exempt``.
        multiple: kept FFN channels are rounded to it, 1 for none; ``default_multiple``.

    Raises:
        InputError: the ratio is out of range, or every layer is exempt.
    """
    return spec.resized(cut_widths(spec, ratio, parts, exempt, multiple))


def cut_widths(
    spec: ModelSpec,
    ratio: float,
    parts: str = "ffn+kv",
    exempt: tuple[int, int] | None = None,
    multiple: int | None = None,
) -> tuple[Widths, ...]:
    """The widths of each layer after pruning; see ``cut_spec``.

    Raises:
        InputError: the ratio is none, or no layer is left to prune.
    """
    if not 0 <= ratio < 1:
        raise InputError(
            f"--prune-ratio {ratio:g} is not a share from 0 to below 1.",
            next_step="0.85 removes 85 % of the pruned parts.",
        )
    first, last = default_exempt(spec.num_layers) if exempt is None else exempt
    if ratio and first + last >= spec.num_layers:
        raise InputError(
            f"--prune-exempt {first},{last} leaves none of the {spec.num_layers} layers of {spec.name} to prune.",
            next_step="Name fewer, such as --prune-exempt 0,0.",
        )
    removed = Fraction(repr(float(ratio)))  # as written: 0.07 of 100 channels is 7 of them, not 7.000000000000001
    pruned = range(first, spec.num_layers - last)

    @cache  # few of a hundred layers differ
    def kept(whole: Widths) -> Widths:
        return Widths(
            _kept_ffn(whole.ffn, removed, multiple) if "ffn" in parts else whole.ffn,
            _kept_kv_heads(spec, whole.kv_heads, removed) if "kv" in parts else whole.kv_heads,
        )

    return tuple(kept(whole) if index in pruned else whole for index, whole in enumerate(spec.widths))


def small_spec(spec: ModelSpec, recipe: Recipe) -> ModelSpec:
    """The shape of the small model that ``recipe`` asks for: of the folder that it names, or what a ratio leaves.

    Where layers compete (``--prune-ranking global``) the scores decide how wide each becomes; this is then the most
    uneven outcome, of the same sum: as many layers as possible whole, the others as narrow as can be. No other takes
    more memory.

    Raises:
        InputError: it names no ratio, or one that cannot be, or a folder that holds no small model of ``spec``.
    """
    if recipe.small_model:
        return _made_before(spec, Path(recipe.small_model))
    if recipe.prune_ratio is None:
        raise InputError("Pruning needs a ratio.", next_step="Try --prune-ratio 0.5: half of what can be pruned goes.")
    widths = cut_widths(spec, recipe.prune_ratio, recipe.prune_parts, recipe.prune_exempt, recipe.prune_round)
    if recipe.prune_ranking == "global":
        widths = _most_uneven(spec.widths, widths, recipe.prune_round or default_multiple(spec.ffn))
    small = spec.resized(widths)
    return small.with_biases(read_pruned(spec, widths)) if recipe.align == "bias" else small


def _made_before(spec: ModelSpec, folder: Path) -> ModelSpec:
    """The shape in the config.json of a pruned model's folder."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise InputError(
            f"{folder} holds no config.json of a pruned model.",
            next_step="Name with --small-model a folder that `effitrain prune` wrote.",
        )
    small = spec_from_config(config, str(folder))
    same = all(getattr(small, size) == getattr(spec, size) for size in ("hidden", "head_dim", "num_layers", "vocab"))
    if not same or any(
        s.ffn > w.ffn or s.kv_heads > w.kv_heads for s, w in zip(small.widths, spec.widths, strict=True)
    ):
        raise InputError(
            f"The small model {folder} was not cut from {spec.name}: their sizes do not go together.",
            next_step="Name with --model the model that was pruned.",
        )
    return spec.resized(small.widths).with_biases([path for path, linear in small.linears.items() if linear.bias])


def cut_facts(folder: Path) -> dict[str, Any] | None:
    """What ``prune`` noted beside a small model that it was made of; None where nothing can be read."""
    try:
        noted = json.loads((folder / CUT_FACTS).read_text(encoding="utf-8"))["made_of"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return noted if isinstance(noted, dict) else None


def ratio_of(spec: ModelSpec, small: ModelSpec, recipe: Recipe) -> float:
    """The ratio that ``small`` was cut by: what ``prune`` noted in its folder, else the recipe's own where it leaves as
    many weights, else what is gone.
    """
    noted = (cut_facts(Path(recipe.small_model or "")) or {}).get("prune_ratio")
    if isinstance(noted, int | float):
        return float(noted)
    with suppress(InputError):  # a ratio with which no layer is left to prune
        if recipe.prune_ratio and cut_spec(spec, recipe.prune_ratio).linear_params == small.linear_params:
            return recipe.prune_ratio
    return removed_share(spec, small)


def removed_share(spec: ModelSpec, small: ModelSpec) -> float:
    """What is gone of the layers that lost anything, as a share of their matrices, rounded to thousandths."""
    pairs = [(a.weights, b.weights) for a, b in zip(spec.layers, small.layers, strict=True) if a.weights != b.weights]
    return round(1 - sum(b for _, b in pairs) / sum(a for a, _ in pairs), 3) if pairs else 0.0


def alignment_recipe(recipe: Recipe) -> Recipe:
    """The run that ``--align train`` makes of the small model: every weight, on every token of the calibration text.

    Rate and single epoch are LoRAM's own (Zhang et al. 2025); the rest is decided by model and plan.
    """
    fields = Recipe.model_fields
    kept = {"format", "columns", "template", "truncation", "packing", "eval_fraction", "max_seq_len", "seed", "dtype",
            "gpu_mem", "host_mem", "gpu"}  # fmt: skip
    given = {name: getattr(recipe, name) if name in kept else fields[name].default for name in fields}
    text = {"dataset": recipe.calib_dataset or recipe.dataset, "train_on_prompt": True}
    return Recipe(**{**given, **text, "method": "full", "quant": "none", "lr": 5e-5, "keep_checkpoints": 1})


def read_pruned(spec: ModelSpec, widths: Sequence[Widths]) -> list[str]:
    """Paths of the linears that read what is pruned: ``o_proj`` and ``down_proj`` of layers that lose inputs."""
    small = spec.resized(widths).linears
    return [
        path
        for path, linear in spec.linears.items()
        if linear.out_axis == Axis.MODEL and small[path].in_features < linear.in_features
    ]


def default_exempt(layers: int) -> tuple[int, int]:
    """First and last layers left whole: 4 and 2 of 80, in proportion, at least one each."""
    return max(1, round(layers * _EXEMPT_FIRST)), max(1, round(layers * _EXEMPT_LAST))


def default_multiple(ffn: int) -> int:
    """What kept FFN channels are a multiple of: 256, a smaller power of two where that would be more than an eighth."""
    return min(_MULTIPLE, 1 << max(0, (ffn // _LEAST_STEPS).bit_length() - 1))


def _kept_ffn(ffn: int, removed: Fraction, multiple: int | None) -> int:
    kept = ffn - math.ceil(ffn * removed)
    step = default_multiple(ffn) if multiple is None else multiple
    return min(ffn, max(1, round(Fraction(kept, step))) * step) if removed else ffn


def _most_uneven(whole: Sequence[Widths], cut: Sequence[Widths], step: int) -> tuple[Widths, ...]:
    ffn = _piled([w.ffn for w in whole], [w.ffn for w in cut], step)
    kv_heads = _piled([w.kv_heads for w in whole], [w.kv_heads for w in cut], 1)
    return tuple(Widths(*pair) for pair in zip(ffn, kv_heads, strict=True))


def _piled(whole: Sequence[int], cut: Sequence[int], least: int) -> list[int]:
    """Sizes of the sum of ``cut``: of those that were cut every one at ``least``, the first ones filled up."""
    sizes = [size if size == full else min(least, size) for full, size in zip(whole, cut, strict=True)]
    left = sum(cut) - sum(sizes)
    for index, full in enumerate(whole):
        more = min(left, full - sizes[index])
        sizes[index] += more
        left -= more
    return sizes


def _kept_kv_heads(spec: ModelSpec, heads: int, removed: Fraction) -> int:
    """At least one. LoRAM rounds towards keeping where heads are grouped and towards removing where they are not."""
    grouped = spec.num_kv_heads < spec.num_heads
    kept = heads - math.floor(heads * removed) if grouped else math.floor(heads * (1 - removed))
    return max(1, kept)
