"""The memory model of forward passes alone, evaluation and chat: no gradients, no optimizer, nothing kept for a
backward pass. In chat the keys and values of every token stay.
"""

from collections.abc import Iterator

from effitrain.core.budget import MemoryBudget
from effitrain.core.layout import BLOCK, NF4
from effitrain.core.ledger import GPU, LedgerLine, Settings, gpu_bytes
from effitrain.core.memory import (
    LOSS_CHUNK_BYTES,
    LOSS_MIN_ROWS,
    OVERHEAD,
    adapter_factors,
    frozen_weights,
    host_lines,
    tables,
)
from effitrain.core.recipe import Recipe
from effitrain.core.spec import ModelSpec


def forward_ledger(spec: ModelSpec, recipe: Recipe, settings: Settings, budget: MemoryBudget) -> tuple[LedgerLine, ...]:
    """What is alive on the device at the worst moment of a forward pass, and what the host holds.

    Three moments compete: a layer, the final norm, and the loss or the next token's logits. Letters as in ``memory``.
    """
    held = (*resident_lines(spec, recipe, settings, budget), *_waiting(spec, settings))
    moments = [_layer(spec, recipe, settings), (_norm(spec, settings),), tuple(_logits(spec, settings))]
    lines = (*held, *max(moments, key=gpu_bytes), *host_lines(spec, recipe, settings, budget.device))
    return tuple(line for line in lines if line.bytes)


def resident_lines(spec: ModelSpec, recipe: Recipe, settings: Settings, budget: MemoryBudget) -> tuple[LedgerLine, ...]:
    """What is on the device all the time."""
    weights = sum(size * count for size, count in adapter_factors(spec, recipe))
    return (
        *frozen_weights(spec, recipe, settings),
        *tables(spec, recipe, settings, budget.device),
        _gpu("adapter weights", 4 * weights, f"{weights:,} x 4 B"),
        _gpu(OVERHEAD, budget.overhead_bytes, "CUDA context, workspaces, allocator slack"),
    )


def _waiting(spec: ModelSpec, settings: Settings) -> Iterator[LedgerLine]:
    """The texts that pass a layer together, and what chat keeps of them."""
    tokens, c, texts = settings.tokens, settings.width, settings.at_once
    each = 3 * 8 + 2 * spec.head_dim * c
    yield _gpu("batch", texts * tokens * each, f"{texts} x T {tokens} x {each} B: ids, positions, rotary tables")
    states = f"{texts} x T {tokens} x h {spec.hidden} x {c} B"
    yield _gpu("hidden states", texts * tokens * spec.hidden * c, states)
    if settings.work == "chat":
        layers = [next(n.out_features for n in layer.linears if n.leaf == "k_proj") for layer in spec.layers]
        wide = 2 * (texts * sum(layers) + max(layers)) * c  # a layer's are copied when a token joins them
        yield _gpu("keys and values", tokens * wide, f"T {tokens} x {wide:,} B in {texts} x {spec.num_layers} layers")


def _layer(spec: ModelSpec, recipe: Recipe, settings: Settings) -> tuple[LedgerLine, ...]:
    """``down_proj``: the residual and the norm of it, gate, up and their product, the output; the weight as floats.
    Where the MLP takes tiles, the attention's queries, keys, values and output may be more.
    """
    layer = max((layer for layer, _ in spec.shapes), key=lambda layer: layer.weights)
    down = next(linear for linear in layer.linears if linear.leaf == "down_proj")
    tokens, c, h = settings.tokens, settings.width, spec.hidden
    queries = next(linear.out_features for linear in layer.linears if linear.leaf == "q_proj")
    wide = max(3 * settings.tile * down.in_features, 4 * tokens * queries)
    size = (3 * tokens * h + wide) * c
    formula = f"(T {tokens} x 3 x h {h} + {wide:,}: 3 x FFN {down.in_features} a token of a tile) x {c} B"
    weight = down.weights * c + 4 * -(-down.weights // BLOCK) if recipe.quant == NF4 else 0
    return (
        _gpu("live layer", size, formula),
        _gpu("dequantised weight", weight, f"down_proj: {down.weights:,} x ({c} + 4/{BLOCK}) B"),
    )


def _norm(spec: ModelSpec, settings: Settings) -> LedgerLine:
    """The final norm: its input in fp32, the squares of it, and the result."""
    each = 2 * 4 + (settings.width if settings.width < 4 else 0)
    tile, h = settings.tile, spec.hidden
    return _gpu("final norm", tile * h * each, f"{tile} tokens x h {h} x {each} B")


def _logits(spec: ModelSpec, settings: Settings) -> Iterator[LedgerLine]:
    tokens, c, h = settings.tokens, settings.width, spec.hidden
    rows = 1 if settings.work == "chat" else min(tokens, max(LOSS_MIN_ROWS, LOSS_CHUNK_BYTES // (4 * spec.vocab)))
    each = 4 + (c if c < 4 else 0)
    formula = f"{rows} rows x (V {spec.vocab} x {each} B + h {h} x {c} B)"
    yield _gpu("logits", rows * (spec.vocab * each + h * c), formula)
    yield _gpu("final hidden states", tokens * h * c, f"T {tokens} x h {h} x {c} B")


def _gpu(what: str, size: int, formula: str) -> LedgerLine:
    return LedgerLine(what, GPU, size, formula)
