"""How fast a step would be, from stated rates: for choosing between plans and for people, never for a promise.

Letters: W weights of the decoder linears, T tokens of a micro-batch, h hidden size, S tokens of a sample.
"""

from dataclasses import dataclass

from effitrain.core.blobs import blobs, placed
from effitrain.core.cards import Rates
from effitrain.core.ledger import Settings
from effitrain.core.recipe import Recipe
from effitrain.core.spec import LayerSpec, ModelSpec

# Share of its peak that a card reaches in QLoRA training: fsdp_qlora's run of 70B on two RTX 4090, 98 of 165 TFLOP/s.
EFFICIENCY = 0.6
# Bytes moved to dequantise one weight to 16 bits: 0.516 read, 2 written.
DEQUANT_BYTES = 2.516
# What layers from a disk cost where they hide as well as those in memory, for each reading of a step: an assumption, so
# that memory is preferred, and reading once a step to reading for every micro-batch.
DISK_LOSS = 0.1


@dataclass(frozen=True)
class StepTime:
    """Seconds of a micro-batch's forward pass, its backward pass (0: none), and of copying streamed layers in each."""

    forward: float
    backward: float
    copy: float

    @property
    def total(self) -> float:
        """Copies run beside the computation; each pass takes the longer of the two."""
        return sum(max(seconds, self.copy) for seconds in self._passes)

    @property
    def hidden_share(self) -> float:
        """Share of the copies' time that computation covers; 1 where there are none."""
        if not self.copy:
            return 1.0
        return sum(min(seconds, self.copy) for seconds in self._passes) / (len(self._passes) * self.copy)

    @property
    def _passes(self) -> list[float]:
        return [self.forward, self.backward] if self.backward else [self.forward]


def step_time(spec: ModelSpec, recipe: Recipe, settings: Settings, rates: Rates) -> StepTime:
    """The time of a micro-batch."""
    once = sum(count * _layer(layer, spec, settings) for layer, count in spec.shapes)
    again = sum(count * _again(layer, spec, settings) for layer, count in spec.shapes)
    head = 2 * settings.tokens * spec.embedding_params
    dequant = DEQUANT_BYTES * _dequantised(spec, settings) / rates.memory if recipe.quant == "nf4" else 0.0
    share = again / once
    forward = (once + 2 * head) / (EFFICIENCY * rates.flops) + dequant  # the loss brings its gradient along
    if settings.work != "train":
        return StepTime(forward, 0.0, _copy(spec, recipe, settings, rates))
    backward = (once + again) / (EFFICIENCY * rates.flops) + (1 + share) * dequant
    return StepTime(forward, backward, _copy(spec, recipe, settings, rates))


def tokens_per_second(spec: ModelSpec, recipe: Recipe, settings: Settings, rates: Rates) -> float:
    """Estimated speed of training."""
    share = 1 - DISK_LOSS * settings.passes / settings.grad_accum if settings.on_disk else 1.0
    return share * settings.tokens / step_time(spec, recipe, settings, rates).total


def tokens_to_hide(spec: ModelSpec, recipe: Recipe, settings: Settings, rates: Rates) -> int:
    """Tokens that pass a layer at a time from which the copies vanish behind the forward pass; 0 without copies."""
    time = step_time(spec, recipe, settings, rates)
    return round(settings.grad_accum * settings.tokens * time.copy / (settings.passes * time.forward))


def _layer(layer: LayerSpec, spec: ModelSpec, settings: Settings) -> float:
    """FLOP of a layer's forward pass; that of its inputs' gradients is the same. Causal attention does half,
    and shifted sparse attention that of its groups.
    """
    reach = settings.s2_group or settings.max_seq_len
    queries = next(linear.out_features for linear in layer.linears if linear.leaf == "q_proj")
    return settings.tokens * (2 * layer.weights + 2 * reach * queries)


def _dequantised(spec: ModelSpec, settings: Settings) -> int:
    """Weights that a forward pass dequantises: those of MLPs for each of their tiles."""
    mlps = sum(n.weights * count for layer, count in spec.shapes for n in layer.linears if n.name.startswith("mlp."))
    return spec.linear_params + (settings.mlp_tiles - 1) * mlps


def _again(layer: LayerSpec, spec: ModelSpec, settings: Settings) -> float:
    """FLOP of what is computed again: all but ``down_proj``, whose output is not needed, or gate and up alone."""
    if settings.recompute == "none":
        return 0.0
    sizes = {linear.leaf: linear.weights for linear in layer.linears}
    if settings.recompute == "mlp":
        return 2 * settings.tokens * (sizes["gate_proj"] + sizes["up_proj"])
    return _layer(layer, spec, settings) - 2 * settings.tokens * sizes["down_proj"]


def _copy(spec: ModelSpec, recipe: Recipe, settings: Settings, rates: Rates) -> float:
    """A micro-batch's share of the seconds that copying the streamed layers once takes, and those of its layer inputs,
    which go by the same link.
    """
    inputs = spec.num_layers * settings.tokens * spec.hidden * settings.width if settings.offload else 0
    if not settings.streamed and not inputs:
        return 0.0
    place, share = placed(spec, settings), settings.passes / settings.grad_accum
    streamed, read = (share * sum(blobs(spec, recipe, settings, which)) for which in (place.streamed, place.on_disk))
    return max((streamed + inputs) / rates.link, read / rates.disk)
