"""Scores of every layer of a model, one layer in memory at a time."""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from effitrain.core.errors import InputError
from effitrain.core.spec import Axis
from effitrain.core.stages import KEPT_INPUTS
from effitrain.data.batches import MicroBatch
from effitrain.kernels.linear_cross_entropy import linear_cross_entropy
from effitrain.model.walk import Passing, Walk, frozen, grouped
from effitrain.pruning.scores.seen import Seen, SeenLayer

Scores = Mapping[int, Mapping[Axis, Tensor]]


def needs(name: str) -> str:
    """What the score ``name`` must see: nothing, weights, inputs or gradients."""
    return importlib.import_module(f"effitrain.pruning.scores.{name}").NEEDS


def looked_at(name: str, walk: Walk, batches: Sequence[MicroBatch]) -> Sequence[MicroBatch]:
    """What the score ``name`` looks at of ``batches``: all, or for a gradient score the first ones, whose inputs of all
    layers fit 4 GiB of host memory.
    """
    if needs(name) != "gradients":
        return batches
    return next(grouped(batches, walk.tokens_within(KEPT_INPUTS // walk.decoder.spec.num_layers)), [])


def score_layers(
    name: str,
    walk: Walk,
    layers: Sequence[int],
    parts: Sequence[Axis],
    seed: int,
    batches: Sequence[MicroBatch] = (),
    progress: Callable[[int], None] = lambda index: None,
) -> dict[int, dict[Axis, Tensor]]:
    """The scores of ``parts`` in ``layers``: float32 [groups] by layer and part.

    Args:
        name: of a file in ``scores/``.
        walk: through the full-size model.
        layers: to be pruned.
        parts: FFN, KV_HEADS or both.
        seed: of the random score.
        batches: calibration text, of which ``looked_at`` is used.
        progress: told each layer that is done.

    Raises:
        InputError: a score is not finite.
    """
    module = importlib.import_module(f"effitrain.pruning.scores.{name}")
    visit = {"nothing": _nothing, "weights": _weights, "inputs": _inputs, "gradients": _gradients}[module.NEEDS]
    spec, found = walk.decoder.spec, {}
    for index, linears in visit(walk, list(layers), looked_at(name, walk, batches)):
        layer = SeenLayer(spec.layers[index], spec.widths[index].kv_heads, seed, linears)
        found[index] = {part: module.score(layer, part) for part in parts}
        _check_finite(found[index], index, name)
        progress(index)
    return found


Visits = Iterator[tuple[int, Mapping[str, Seen]]]


def _nothing(walk: Walk, layers: list[int], batches: Sequence[MicroBatch]) -> Visits:
    return ((index, {}) for index in layers)


def _weights(walk: Walk, layers: list[int], batches: Sequence[MicroBatch]) -> Visits:
    for index in layers:
        with walk.layer(index) as layer:
            yield index, _seen(walk, index, layer)


@torch.no_grad()
def _inputs(walk: Walk, layers: list[int], batches: Sequence[MicroBatch]) -> Visits:
    passing = walk.start(batches)
    for index in range(max(layers) + 1):
        with walk.layer(index) as layer:
            seen = _seen(walk, index, layer)
            with _watching(layer, seen, lambda one, x, y: one.see(x)):
                for one in passing:
                    one.x = walk.run(layer, one).cpu()
            if index in layers:
                yield index, seen


def _gradients(walk: Walk, layers: list[int], batches: Sequence[MicroBatch]) -> Visits:
    """A forward pass that keeps every layer's inputs, then a backward pass that visits the layers in reverse."""
    passing = walk.start(batches)
    kept: list[list[Tensor]] = []
    with torch.no_grad():
        for index in range(walk.decoder.spec.num_layers):
            kept.append([one.x for one in passing])
            with walk.layer(index) as layer:
                for one in passing:
                    one.x = walk.run(layer, one).cpu()
    gradients = _loss_gradients(walk, passing)
    for index in reversed(range(min(layers), walk.decoder.spec.num_layers)):
        with walk.layer(index) as layer:
            seen = _seen(walk, index, layer)
            for one, x, grad in zip(passing, kept.pop(), gradients, strict=True):
                one.x = x.requires_grad_()
                with _watching(layer, seen, _see_gradient), torch.enable_grad():
                    walk.run(layer, one).backward(grad)
            gradients = [_grad(one.x) for one in passing]
            if index in layers:
                yield index, seen


def _loss_gradients(walk: Walk, passing: list[Passing]) -> list[Tensor]:
    """Gradients of the summed loss in the last layer's outputs."""
    gradients = []
    with walk.head(), torch.enable_grad():
        for one in passing:
            x = one.x.to(walk.device).requires_grad_()
            hidden = walk.decoder.model.norm(x)[0]  # type: ignore[operator]
            linear_cross_entropy(hidden, walk.decoder.lm_head, one.batch.labels, []).backward()
            gradients.append(_grad(x))
    return gradients


def _grad(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


def _see_gradient(seen: Seen, x: Tensor, y: Tensor) -> None:
    y.register_hook(lambda grad: seen.see_gradient(x.detach(), grad))


def _seen(walk: Walk, index: int, layer: nn.Module) -> dict[str, Seen]:
    names = [linear.name for linear in walk.decoder.spec.layers[index].linears]
    return {name: Seen(frozen(layer.get_submodule(name))) for name in names}


@contextmanager
def _watching(
    layer: nn.Module, seen: Mapping[str, Seen], see: Callable[[Seen, Tensor, Tensor], None]
) -> Iterator[None]:
    """Within it ``see(seen, x, y)`` is told every input and output of the layer's linears."""

    def hook(one: Seen) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        return lambda module, inputs, output: see(one, inputs[0], output)

    handles = [layer.get_submodule(name).register_forward_hook(hook(one)) for name, one in seen.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_finite(scores: Mapping[Axis, Tensor], index: int, name: str) -> None:
    for part, values in scores.items():
        bad = int((~torch.isfinite(values)).sum())
        if bad:
            raise InputError(
                f"The {name} scores of layer {index} ({part}) hold {bad} values that are NaN or infinite.",
                "The weights are damaged, or the dtype overflows on the calibration text.",
                "Try --dtype fp32, or --prune-score magnitude.",
            )
