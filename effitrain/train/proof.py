"""The real training step run symbolically: shapes without data, on any machine, with every storage counted.

Layers of one kind take the same bytes each, so a few of each kind are run and the rest is added: every phase of a step
is linear in the number of layers of a kind. A test compares with the full depth.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from effitrain.adapters.base import Clock
from effitrain.core.blobs import SLOTS
from effitrain.core.cut import small_spec
from effitrain.core.ledger import GPU
from effitrain.core.memory import OVERHEAD
from effitrain.core.methods import SAMPLED
from effitrain.core.placement import Placement, place
from effitrain.core.plan import Plan, resolve
from effitrain.core.recipe import Recipe
from effitrain.core.spec import ModelSpec
from effitrain.core.weights import MIN_8BIT, STATE_BLOCK, busy_layers, returning_bytes, trains_tables
from effitrain.data.batches import MicroBatch
from effitrain.io.synthetic import EmptyCheckpoint, shapes_of
from effitrain.model.decoder import Decoder, build
from effitrain.model.load import DTYPES, fill, stream
from effitrain.quant.nf4 import warm_up
from effitrain.stream.fresh import FreshLayers
from effitrain.train.job import chosen, keep_less
from effitrain.train.lisa import extremes
from effitrain.train.loss import backward_by_layer, loss_sum
from effitrain.train.memory import StorageTracker, model_tensors, optimizer_tensors
from effitrain.train.optim import gradients, make_optimizer, scale
from effitrain.train.trainable import make_trainable

STEP = "the step"
COMPONENTS = {
    "frozen weights": (
        "frozen linears", "NF4 offsets", "streaming slots", "embedding", "embedding, tied to the head", "head",
        "norms and biases",
    ),
    "trained tensors and their gradients": (
        "adapter weights", "adapter gradients", "trained weights", "gradients", "embedding, trained",
        "embedding gradient",
    ),
    "optimizer states": ("optimizer states", "embedding moments"),
    STEP: (),
}  # fmt: skip
KEPT, KEPT_STREAMED = 2, SLOTS  # layers of each kind that are run; one more of a kind shows what it adds


@dataclass(frozen=True)
class Tracked:
    """Bytes on the device: what lives through the whole step, and the most at any moment of each phase.

    Attributes:
        frozen: weights, embedding (where it lies on the device), head, norms.
        adapters: trainable weights and their gradients.
        optimizer: its states.
        buffers: made once and used in every step.
        forward: the most during the forward pass and the loss, all of the above included.
        backward: the same for the backward pass.
        step: the same for the optimizer's step.
    """

    frozen: int
    adapters: int
    optimizer: int
    buffers: int
    forward: int
    backward: int
    step: int

    @property
    def peak(self) -> int:
        """The most at any moment."""
        return max(self.forward, self.backward, self.step)

    def plus(self, other: "Tracked", times: int) -> "Tracked":
        """Every figure with ``times`` the other's added."""
        return Tracked(*(a + times * b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Step:
    """What is run.

    Attributes:
        spec: the shape of the model that is trained.
        config: the full-size model's config.json.
        recipe: with every choice made.
        device: on ``cuda`` an untied embedding lies on the host.
        streamed: by layer, whether it only visits the device.
        at_once: micro-batches that pass each layer together.
        trained: by layer, whether anything of it is trained.
    """

    spec: ModelSpec
    config: Mapping[str, Any]
    recipe: Recipe
    device: str
    streamed: tuple[bool, ...]
    at_once: int = 1
    trained: tuple[bool, ...] = ()

    @property
    def active(self) -> list[int] | None:
        """The layers that LISA trains; None for other methods."""
        return [i for i, one in enumerate(self.trained) if one] if self.recipe.method in SAMPLED else None

    @property
    def host_embedding(self) -> bool:
        """Whether the embedding is no tensor of the device."""
        if self.recipe.train_embeddings:
            return self.device == "cuda"
        return self.device == "cuda" and not self.spec.tied and not trains_tables(self.spec, self.recipe)


def proved(plan: Plan, spec: ModelSpec, config: Mapping[str, Any], recipe: Recipe, device: str) -> Plan:
    """``plan`` with its proof: the same step tracked, the context and slack of the plan added.

    Args:
        plan: made from ``recipe``.
        spec: the full-size model's shape.
        config: its config.json.
        recipe: as asked.
        device: ``cpu`` or ``cuda``.
    """
    full, settings = resolve(recipe, plan), plan.settings
    ratio = plan.prune_ratio
    masked = full.prune_method == "loraprune"  # trains the whole model
    trained = spec if ratio is None or masked else small_spec(spec, full)
    placement = place(spec.num_layers, plan.resident_layers, SLOTS)
    active = extremes(spec.num_layers, busy_layers(spec, full)) if full.method in SAMPLED else range(spec.num_layers)
    streamed = _with_active(placement, active if full.method in SAMPLED else ())
    busy = tuple(layer in active for layer in range(spec.num_layers))
    tracked = track(Step(trained, config, full, device, streamed, settings.at_once, busy))
    held = (tracked.frozen, tracked.adapters, tracked.optimizer)
    parts = dict(zip(COMPONENTS, (*held, tracked.peak - sum(held)), strict=True))
    predicted = Counter[str]()
    for line in plan.ledger:
        if line.where == GPU and line.what != OVERHEAD:
            predicted[next((part for part, lines in COMPONENTS.items() if line.what in lines), STEP)] += line.bytes
    components = [
        {"what": part, "predicted_bytes": predicted[part], "tracked_bytes": size} for part, size in parts.items()
    ]
    error = sum(predicted.values()) / tracked.peak - 1
    proof = {"peak_bytes": tracked.peak + plan.overhead_bytes, "error": error, "components": components}
    return replace(plan, proof=proof)


def _with_active(placement: Placement, active: Sequence[int]) -> tuple[bool, ...]:
    """By layer, whether it streams: as many as ``placement`` says, and first of all the layers that LISA trains, whose
    frozen weights then free no memory of the device.
    """
    others = [layer for layer in placement.streamed if layer not in active]
    streamed = {*active, *others} if placement.streamed else set()
    for layer in others[: max(0, len(streamed) - len(placement.streamed))]:
        streamed.remove(layer)
    return tuple(layer in streamed for layer in range(placement.num_layers))


def track(step: Step) -> Tracked:
    """The bytes of a step."""
    kinds = [
        (layer.linears, layer.other_params, trained, visits)
        for layer, visits, trained in zip(step.spec.layers, step.streamed, step.trained, strict=True)
    ]
    counts = Counter(kinds)
    kept = {kind: min(KEPT_STREAMED if kind[-1] else KEPT, count) for kind, count in counts.items()}
    base = total = _run(_thinned(step, kinds, kept))
    for kind, count in counts.items():
        if count > kept[kind]:
            one_more = _run(_thinned(step, kinds, {**kept, kind: kept[kind] + 1}))
            total = total.plus(one_more.plus(base, -1), count - kept[kind])
    return total


def _thinned(step: Step, kinds: Sequence[Any], numbers: Mapping[Any, int]) -> Step:
    """The last layers of each kind, as many as ``numbers`` says."""
    left = dict(numbers)
    picked: list[int] = []
    for index in reversed(range(len(kinds))):
        if left[kinds[index]]:
            left[kinds[index]] -= 1
            picked.insert(0, index)
    layers = tuple(replace(step.spec.layers[index], index=place) for place, index in enumerate(picked))
    config = {**step.config, "num_hidden_layers": len(layers)}
    visits, trained = (tuple(flags[index] for index in picked) for flags in (step.streamed, step.trained))
    spec = replace(step.spec, layers=layers)
    return replace(step, spec=spec, config=config, streamed=visits, trained=trained)


def _run(step: Step) -> Tracked:
    with _symbolic():
        decoder = _model(step)
        embedding: Any = decoder.get_submodule("model.embed_tokens")
        tables: list[Tensor] = [embedding.weight] if step.recipe.train_embeddings else []
        for table in tables:  # shapes have no sparse gradient: that of the rows handed on stands for it
            table.requires_grad_(False)
            embedding.register_forward_hook(lambda module, ids, rows: rows.requires_grad_())
        parameters: list[Tensor] = [p for p in decoder.parameters() if p.requires_grad]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer = _optimizer(step.recipe, parameters)
        # Of all rows, as the ledger counts them: which ones a batch has, shapes cannot tell.
        row_grads = [torch.zeros(t.numel() + 2 * len(t)) for t in tables]
        moments = [torch.zeros(2 * t.numel() + 3 * len(t)) for t in tables]
        tracker = StorageTracker()
        if step.host_embedding:
            tracker.ignore(embedding.weight, *row_grads, *moments)
        if decoder.offload:
            tracker.ignore(decoder.offload.host)
        # Gradients are named nowhere else: what somebody holds is not added to in place.
        adapters = _added(
            tracker, [*parameters, *(p.grad for p in parameters if p.grad is not None), *tables, *row_grads]
        )
        frozen = _added(tracker, model_tensors(decoder))
        states = _added(tracker, [*optimizer_tensors(optimizer), *moments])
        buffers = _added(tracker, [decoder.offload.staging] if decoder.offload else [])
        with tracker:
            forward, backward, update = _step(step, decoder, parameters, optimizer, tracker)
        return Tracked(frozen, adapters, states, buffers, forward, backward, update)


def _step(
    step: Step, decoder: Decoder, parameters: list[Tensor], optimizer: Optimizer, tracker: StorageTracker
) -> tuple[int, int, int]:
    """The peaks of forward pass and loss, of the backward pass, and of the optimizer's step; of forward and backward
    together where several micro-batches pass a layer together.
    """
    batch = _full_batch(step.recipe)
    if step.at_once > 1:
        backward_by_layer(decoder, [batch] * step.at_once, lambda number: None)
        forward = back = tracker.restart()
    else:
        loss = loss_sum(decoder, batch)
        forward = tracker.restart()
        loss.backward()
        back = tracker.restart()
    scale(gradients(parameters), 0.5)
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    return forward, back, tracker.restart()


def _added(tracker: StorageTracker, tensors: Iterable[Tensor]) -> int:
    """Bytes that counting these added."""
    before = tracker.live
    tracker.add(tensors)
    return tracker.live - before


@contextmanager
def _symbolic() -> Iterator[None]:
    """Tensors made within have a shape and no memory."""
    warm_up(torch.device("cpu"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def _model(step: Step) -> Decoder:
    recipe, dtype, device = step.recipe, DTYPES[step.recipe.dtype], torch.device("cpu")
    weights = EmptyCheckpoint(shapes_of(step.spec), 0, recipe.quant == "nf4", dtype)
    visiting = [layer for layer, visits in enumerate(step.streamed) if visits]
    decoder = build(step.spec, step.config, step.spec.name)
    fill(decoder, weights, recipe.quant, dtype, device, streamed=visiting)
    resident = frozenset(range(step.spec.num_layers)) - set(visiting)
    placement = Placement(step.spec.num_layers, resident, frozenset(), min(SLOTS, len(visiting)))
    source = FreshLayers(step.spec, weights, recipe.quant, recipe.dtype)
    room = returning_bytes(step.spec, recipe, recipe.dtype)
    stream(decoder, source, placement, device, shapes_only=True, slot_bytes=room)
    plain = EmptyCheckpoint(shapes_of(step.spec), 0, False, dtype)
    make_trainable(decoder, recipe, Clock(recipe.seed), lambda: plain, step.active)
    keep_less(decoder, recipe, chosen(recipe.batch_size) * chosen(recipe.max_seq_len), step.at_once)
    return decoder


def _full_batch(recipe: Recipe) -> MicroBatch:
    """Rows of full length, every token trained."""
    rows, length = chosen(recipe.batch_size), chosen(recipe.max_seq_len)
    ids = torch.zeros(rows * length, dtype=torch.int64)
    places = torch.arange(rows * length)
    return MicroBatch(ids, ids, places % length, (length,) * rows, places, rows)


def _optimizer(recipe: Recipe, parameters: list[Tensor]) -> Optimizer:
    """The optimizer with its states made."""
    if recipe.optimizer == "adamw":
        optimizer = make_optimizer("adamw", parameters, chosen(recipe.lr), 0.0)
    else:
        optimizer = ShapesOfAdamW8bit(parameters, {})
    optimizer.step()
    return optimizer


class ShapesOfAdamW8bit(Optimizer):
    """The states of bitsandbytes' 8-bit AdamW, whose step works on data alone; it takes no temporaries."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Make the states at the first call."""
        for parameter in self.param_groups[0]["params"]:
            if not self.state[parameter]:
                size, small = parameter.numel(), parameter.numel() < MIN_8BIT
                for moment in ("1", "2"):
                    dtype = torch.float32 if small else torch.uint8
                    self.state[parameter][f"state{moment}"] = torch.empty(size, dtype=dtype)
                    if not small:
                        self.state[parameter][f"absmax{moment}"] = torch.empty(-(-size // STATE_BLOCK))
