"""The stages that make a small model: scores, selection, cut and alignment, each of them reusable."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from effitrain.core.cut import cut_facts, default_multiple, small_spec
from effitrain.core.errors import InputError
from effitrain.core.keep import KeepMap, LayerKeep
from effitrain.core.positions import position_facts
from effitrain.core.recipe import Recipe
from effitrain.core.spec import Axis, ModelSpec, Widths, pruned_config
from effitrain.data.cache import default_cache_dir
from effitrain.io.atomic import remove_folder, write_safetensors
from effitrain.io.checkpoint import open_checkpoint
from effitrain.io.keep import read_keep
from effitrain.model.decoder import build
from effitrain.model.load import Base, find_base
from effitrain.model.walk import Walk
from effitrain.pruning.align import Aligner, Fit
from effitrain.pruning.bias import Biases
from effitrain.pruning.calibration import Calibration
from effitrain.pruning.cut import CutWeights, Source, write_cut
from effitrain.pruning.groups import check_family
from effitrain.pruning.score import looked_at, needs, score_layers
from effitrain.pruning.select import Scores, select, shared_out
from effitrain.quant.nf4 import quantize
from effitrain.quant.read import DTYPES

_CODE_VERSION = 3  # raise it when the same choices would give another small model


# Trains every weight of the model in the first folder, with its run in the second: the folder of the result, and facts.
Training = Callable[[Path, Path], tuple[Path, Mapping[str, Any]]]


@dataclass(frozen=True)
class Small:
    """A small model that can be trained, and what was kept of the full-size one."""

    base: Base
    keep: KeepMap


def make_small(
    base: Base,
    recipe: Recipe,
    calibration: Callable[[], Calibration],
    device: torch.device,
    target: Path,
    tell: Callable[[str], None] = lambda text: None,
    train: Training | None = None,
) -> Small:
    """Prune ``base`` into the folder ``target``, unless it is there already.

    Args:
        base: the full-size model, with its files on disk; for synthetic weights nothing is written.
        recipe: with its dtype chosen.
        calibration: asked for the text if a stage needs it.
        device: where layers compute.
        target: complete or absent; refused when it holds something else.
        tell: told what is done.
        train: for ``--align train``.

    Raises:
        InputError: the family, the ratio, the text or the target cannot be used.
    """
    if recipe.small_model:
        return open_small(Path(recipe.small_model), base)
    spec = small_spec(base.spec, recipe)
    if base.synthetic_seed is not None:
        return _synthetic(base, spec, recipe.seed)
    check_family(base.source.config, base.name)
    source: Source = base.weights()  # type: ignore[assignment]
    loses = spec.widths != base.spec.widths
    text = (
        calibration()
        if loses and (needs(recipe.prune_score) in ("inputs", "gradients") or recipe.align != "none")
        else None
    )
    made_of = _made_of(base, recipe, source.fingerprint(), text, device)
    place = target.with_name(f"{target.name}-align")
    if target.exists() and any(target.iterdir()):
        _remove(place)
        return _reuse(target, made_of, tell)
    scores = _scores(base, source, recipe, text, device, tell) if loses else {}
    keep = KeepMap.of(base.spec, _select(base.spec, recipe, scores), base.name, source.fingerprint())
    if loses and recipe.prune_ranking == "global" and keep.widths == _even(base.spec, recipe):
        tell(_came_out_local(base.spec, recipe))
    cut = CutWeights(source, base.spec, keep)
    if recipe.align == "train" and text:
        assert train is not None
        weights, fits = _trained(base, cut, place, made_of, train)
    else:
        weights, fits = _aligned(base, cut, recipe, text, device, tell)
    write_cut(
        target, weights, base.source.config, base.source.folder,
        lambda: {"made_of": made_of, "alignment": [asdict(fit) if isinstance(fit, Fit) else fit for fit in fits]},
        quantize=(lambda matrix: quantize(matrix.to(device, DTYPES[recipe.dtype]))) if recipe.quant == "nf4" else None,
    )  # fmt: skip
    _remove(place)
    tell(f"Pruned: {target}, {weights.small_spec.params:,} of {base.spec.params:,} parameters.")
    return open_small(target, base)


def _came_out_local(spec: ModelSpec, recipe: Recipe) -> str:
    step = recipe.prune_round or default_multiple(spec.ffn)
    return (
        f"Shared out in runs of {step} FFN channels and whole KV heads, --prune-ranking global came out as local:"
        " every layer keeps what the others keep. A smaller --prune-round lets them differ."
    )


def _trained(
    base: Base, cut: CutWeights, place: Path, made_of: Mapping[str, Any], train: Training
) -> tuple[CutWeights, list[Any]]:
    """The cut weights after training them all, and its facts. What lies in ``place`` is gone on with."""
    if (place / "cut").exists():
        _check_made_of(place / "cut", made_of)
    else:
        place.mkdir(parents=True, exist_ok=True)
        write_cut(place / "cut", cut, base.source.config, base.source.folder, lambda: {"made_of": made_of})
    folder, facts = train(place / "cut", place / "run")
    trained = open_checkpoint(folder)
    return replace(cut, edit=lambda name, tensor: trained.read(name).to(tensor.dtype)), [facts]


def _remove(folder: Path) -> None:
    if folder.exists():
        remove_folder(folder)


def _select(spec: ModelSpec, recipe: Recipe, scores: Scores) -> list[LayerKeep]:
    widths = _even(spec, recipe)
    if recipe.prune_ranking == "global":
        widths = shared_out(spec, widths, scores, recipe.prune_round or default_multiple(spec.ffn))
    return select(spec, widths, scores)


def _even(spec: ModelSpec, recipe: Recipe) -> tuple[Widths, ...]:
    """Widths where no layer competes with another."""
    return small_spec(spec, recipe.changed(prune_ranking="local")).widths


def _aligned(
    base: Base,
    cut: CutWeights,
    recipe: Recipe,
    text: Calibration | None,
    device: torch.device,
    tell: Callable[[str], None],
) -> tuple[CutWeights, list[Fit]]:
    """The cut weights as ``--align`` wants them, and the errors, which are all there when all weights were read."""
    if text is None or recipe.align == "none":
        return cut, []
    full = _walk(base, cut.source, recipe, device)
    told: Callable[[Fit], None] = lambda fit: tell(_describe(fit))  # noqa: E731
    if recipe.align == "bias":
        biases = Biases(full, cut.keep, text.batches, told)
        return replace(cut, edit=biases, biases=biases.paths), biases.fits
    aligner = Aligner(full, _walk(base, cut, recipe, device), cut.keep, text.batches, told)
    return replace(cut, edit=aligner), aligner.fits


def open_small(folder: Path, base: Base) -> Small:
    """A small model that was made before, by this project or an aligned one that somebody publishes.

    Raises:
        InputError: it is no pruned model, or was not cut from ``base``.
    """
    keep = read_keep(folder)
    check_base(keep, base)
    small = find_base(str(folder)).fetched()
    if small.spec.widths != keep.widths:
        raise InputError(f"The keep map and the config.json of {folder} do not go together.", next_step="Prune again.")
    return Small(small, keep)


def check_base(keep: KeepMap, base: Base) -> None:
    """Refuse a full-size model that is not the one that was pruned.

    Raises:
        InputError: sizes or weights differ.
    """
    keep.check(base.spec)
    if keep.fingerprint != base.weights().fingerprint():
        raise InputError(
            f"{base.name} has other weights than the model that was pruned, {keep.base}.",
            "It is another version or a fine-tuned one.",
            "Name the model that was pruned with --model.",
        )


def _synthetic(base: Base, spec: ModelSpec, seed: int) -> Small:
    """A rehearsal: random weights of the small shape, and a random keep map."""
    walk = Walk(
        build(base.spec, base.source.config, base.name), base.weights(), "none", torch.float32, torch.device("cpu")
    )
    scores = score_layers("random", walk, range(base.spec.num_layers), (Axis.FFN, Axis.KV_HEADS), seed)
    keep = KeepMap.of(base.spec, select(base.spec, spec.widths, scores), base.name, base.weights().fingerprint())
    source = replace(base.source, config=pruned_config(base.source.config, spec))
    return Small(replace(base, source=source, spec=spec), keep)


def _made_of(
    base: Base, recipe: Recipe, fingerprint: str, text: Calibration | None, device: torch.device
) -> dict[str, Any]:
    chosen = {"prune_ratio", "prune_parts", "prune_score", "prune_ranking", "prune_round", "prune_exempt", "align",
              "quant", "dtype"}  # fmt: skip
    facts: dict[str, Any] = recipe.model_dump(mode="json", include=chosen)
    facts["positions"] = position_facts(base.source.config)
    if recipe.quant == "nf4":
        facts["device"] = device.type  # the two round some weights differently
    seed = recipe.seed if recipe.prune_score == "random" else None
    return {**facts, "seed": seed, "base": fingerprint, "text": text and text.fingerprint, "code": _CODE_VERSION}


def _reuse(target: Path, made_of: Mapping[str, Any], tell: Callable[[str], None]) -> Small:
    _check_made_of(target, made_of)
    tell(f"Pruned before: {target}.")
    return Small(find_base(str(target)).fetched(), read_keep(target))


def _check_made_of(target: Path, facts: Mapping[str, Any]) -> None:
    if cut_facts(target) != facts:
        raise InputError(
            f"{target} holds something else than what pruning would write there.",
            "It was made with other choices, or from another model or text.",
            "Name another output folder with -o, or remove this one.",
        )


def _walk(base: Base, weights: Any, recipe: Recipe, device: torch.device) -> Walk:
    spec = weights.small_spec if isinstance(weights, CutWeights) else base.spec
    return Walk(build(spec, base.source.config, base.name), weights, "none", DTYPES[recipe.dtype], device)


def _scores(
    base: Base,
    source: Source,
    recipe: Recipe,
    text: Calibration | None,
    device: torch.device,
    tell: Callable[[str], None],
) -> Scores:
    """The scores of all layers, kept in the user's cache: they serve every ratio."""
    name, layers = recipe.prune_score, range(base.spec.num_layers)
    batches = text.batches if text else ()
    looks = text.fingerprint if text and needs(name) in ("inputs", "gradients") else recipe.seed
    positions = position_facts(base.source.config)
    key = json.dumps([_CODE_VERSION, name, source.fingerprint(), positions, looks, recipe.dtype], sort_keys=True)
    file = default_cache_dir().with_name("scores") / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    if not file.is_file():
        walk = _walk(base, source, recipe, device)
        tokens = sum(len(batch.input_ids) for batch in looked_at(name, walk, batches))
        tell(f"Scoring {base.spec.num_layers} layers by {name}, {tokens} tokens of text.")
        found = score_layers(name, walk, layers, (Axis.FFN, Axis.KV_HEADS), recipe.seed, batches)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(file, {f"{i}.{part}": found[i][part] for i in found for part in found[i]}, {"format": "pt"})
    stored: dict[str, Tensor] = load_file(file)
    return {index: {part: stored[f"{index}.{part}"] for part in (Axis.FFN, Axis.KV_HEADS)} for index in layers}


def _describe(fit: Fit) -> str:
    return f"Aligned layer {fit.layer} {fit.linear}: error {fit.before:.4f} before, {fit.after:.4f} after."
