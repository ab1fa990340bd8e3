"""The memory model: every byte alive at the worst moment of a training step, each term a function with its formula.

Letters in formulas: T tokens of a micro-batch, L layers, h hidden size, V vocabulary; widths of the compute dtype
(``c`` in the code) are written as 2 B or 4 B.
"""

from collections import Counter
from collections.abc import Iterator
from fractions import Fraction

from effitrain.core.blobs import SLOTS, blobs, placed, summed
from effitrain.core.budget import MemoryBudget
from effitrain.core.layout import BLOCK, NESTED_BLOCK
from effitrain.core.ledger import DISK, GPU, HOST, LedgerLine, Settings, gpu_bytes
from effitrain.core.methods import CHANGES_MODEL, SAMPLED, WEIGHTS, adapter_kind
from effitrain.core.recipe import Recipe
from effitrain.core.spec import LayerSpec, LinearSpec, ModelSpec
from effitrain.core.tiles import tiled_backward
from effitrain.core.weights import (
    active_layers,
    adapting_layers,
    busy_layers,
    elements,
    gradient_bytes,
    master_lines,
    optimizer_bytes,
    returning_bytes,
    saved_by_norms,
    state_bytes,
    trains_tables,
    waiting_layers,
)

# The fp32 logits of one chunk of rows take at most this, and a chunk has at least so many rows.
LOSS_CHUNK_BYTES, LOSS_MIN_ROWS = 64 * 2**20, 16
# Resident size of the process with every library loaded: 0.55 GiB measured with the CPU build of torch; data on top.
PROCESS_BYTES = {"cpu": 2**30, "cuda": 2 * 2**30}
OVERHEAD = "context and slack"


def make_ledger(
    spec: ModelSpec, recipe: Recipe, settings: Settings, budget: MemoryBudget, trained: int | None = None
) -> tuple[LedgerLine, ...]:
    """What is alive on the device at the worst moment of a step, and what the host holds.

    ``trained`` is how many tokens of a micro-batch are trained; all of them where the data are not known.

    Three moments compete: the loss, the backward pass of the final norm, and that of the last layer. The optimizer's
    step is fused and takes no temporaries.
    """
    forward = _activations(spec, recipe, settings)
    rows = settings.tokens if trained is None else trained
    moments = [(*forward, *_loss(spec, recipe, settings, rows)), (*forward, *_layer_backward(spec, recipe, settings))]
    if settings.mlp_tiles == 1:  # a tile of it is less than the loss
        moments.append((*forward, _norm_backward(spec, settings)))
    lines = (
        *held_lines(spec, recipe, settings, budget),
        *max(moments, key=gpu_bytes),
        *host_lines(spec, recipe, settings, budget.device),
    )
    return tuple(line for line in lines if line.bytes)


def held_lines(spec: ModelSpec, recipe: Recipe, settings: Settings, budget: MemoryBudget) -> tuple[LedgerLine, ...]:
    """What is on the device all the time."""
    return (
        *frozen_weights(spec, recipe, settings),
        *tables(spec, recipe, settings, budget.device),
        *(master_lines(spec, recipe, settings) if recipe.method in WEIGHTS else ()),
        *(_adapters(spec, recipe, settings) if adapter_kind(recipe.method) else ()),
        *_trained_embedding(spec, recipe, budget.device),
        _gpu(OVERHEAD, budget.overhead_bytes, "CUDA context, workspaces, allocator slack"),
    )


def adapted(linear: LinearSpec, recipe: Recipe) -> bool:
    """Whether the recipe puts an adapter on this linear; by default on every one except the head."""
    if recipe.lora_targets is None:
        return linear.name != "lm_head"
    return linear.name in recipe.lora_targets or linear.leaf in recipe.lora_targets


def nf4_bytes(weights: int) -> int:
    """Packed codes and both levels of scales of one tensor; its 4-byte offset is not counted."""
    blocks = -(-weights // BLOCK)
    return -(-weights // 2) + blocks + 4 * -(-blocks // NESTED_BLOCK)


def saved_bytes(layer: LayerSpec, spec: ModelSpec, recipe: Recipe, c: int, trained: bool = True) -> tuple[int, int]:
    """Bytes a token that one layer's forward pass keeps for its backward pass: outside the MLP, and in it.

    Counts the storages that autograd holds for transformers' layers around our own linears. Outside: both norms keep
    their input in fp32 and a reciprocal root; attention q, k, v, its output and the logsumexp. In the MLP: gate, up
    and, for down's adapter, the product; Gemma's GeGLU is left to autograd, which keeps gelu(gate) as well. Adapters
    keep their input, one for q, k, v and one for gate and up, and ``x A^T``; a layer's own weights, where they are
    trained, the same inputs; neither, where nothing of the layer is ``trained``. Norms trained beside adapters keep
    what they scale, and shifted sparse attention makes a second copy of its output out of its groups'.
    """
    rows = {linear.leaf: linear.out_features for linear in layer.linears}
    on = {linear.leaf for linear in layer.linears if trained and adapted(linear, recipe)}
    queries, keys = rows["q_proj"], rows["k_proj"]
    scales = recipe.train_norms or (trained and recipe.method in CHANGES_MODEL)
    norms = 2 * (4 * spec.hidden + 4) + (saved_by_norms(layer, spec, c) if scales else 0)
    qk_norms = 4 * (queries + keys + (queries + keys) // spec.head_dim) if spec.qk_norm else 0
    attention = 2 * (queries + keys) * c + 4 * (queries // spec.head_dim)
    attention += queries * c if recipe.attention == "s2" and "o_proj" in on else 0
    product = "down_proj" in on and not recipe.lora_dropout
    wide = 2 + (spec.family == "gemma") + product
    return (
        norms + qk_norms + attention + _adapters_keep(layer, on, ("q_proj", "k_proj", "v_proj"), "o_proj", recipe, c),
        wide * rows["gate_proj"] * c + _adapters_keep(layer, on, ("gate_proj", "up_proj"), "down_proj", recipe, c),
    )


def _adapters_keep(
    layer: LayerSpec, on: set[str], entering: tuple[str, ...], leaving: str, recipe: Recipe, c: int
) -> int:
    """Bytes a token that the adapters of one block keep; the input of the leaving one is counted with the block."""
    mine = [linear for linear in layer.linears if linear.leaf in on and linear.leaf in (*entering, leaving)]
    low = len(mine) * recipe.lora_r * c if recipe.method not in WEIGHTS else 0
    if recipe.lora_dropout:  # every adapter then has an input of its own and a mask
        return low + sum((c + 1) * linear.in_features for linear in mine)
    return low + bool(on & set(entering)) * layer.linears[0].in_features * c


def _gpu(what: str, size: int, formula: str) -> LedgerLine:
    return LedgerLine(what, GPU, size, formula)


def _linears(spec: ModelSpec) -> Iterator[tuple[LinearSpec, int]]:
    """Every different decoder linear and how many there are."""
    return ((linear, count) for layer, count in spec.shapes for linear in layer.linears)


def _layers(spec: ModelSpec, recipe: Recipe) -> Iterator[tuple[LayerSpec, int, bool]]:
    """The different layers, how many there are, and whether anything of them is trained at a time."""
    busy = busy_layers(spec, recipe)
    for layer, count in spec.shapes:
        trained = min(busy, count)
        busy -= trained
        yield from ((layer, number, own) for number, own in ((trained, True), (count - trained, False)) if number)


def adapter_factors(spec: ModelSpec, recipe: Recipe, layers: int | None = None) -> list[tuple[int, int]]:
    """Sizes of the adapters' factors, ``A [r, in]`` and ``B [out, r]``, in all or some layers, and how many of each."""
    share = Fraction(spec.num_layers if layers is None else layers, spec.num_layers)
    in_layers = ((linear, int(count * share)) for linear, count in _linears(spec))
    linears = [(linear, count) for linear, count in (*in_layers, (spec.head, 1)) if adapted(linear, recipe)]
    return [(recipe.lora_r * side, n) for linear, n in linears for side in (linear.in_features, linear.out_features)]


def frozen_weights(spec: ModelSpec, recipe: Recipe, settings: Settings) -> tuple[LedgerLine, ...]:
    """Frozen weights of the resident layers, and the slots that streamed ones visit."""
    place, active = placed(spec, settings), 0
    if recipe.method in CHANGES_MODEL and not settings.streamed:
        active = active_layers(spec, recipe)
    kinds = Counter(spec.kinds[layer] for layer in place.resident)
    resident = [(linear, count) for kind, count in kinds.items() for linear in spec.shapes[kind][0].linears]
    frozen = Fraction(len(place.resident) - active, max(1, len(place.resident)))
    number = int(frozen * sum(count * linear.weights for linear, count in resident))
    tensors = int(frozen * sum(count for _, count in resident))
    weights, on_device = f"{number:,} weights", len(place.resident) - active
    of = f" ({on_device} of {spec.num_layers} layers)" if on_device < spec.num_layers else ""
    slots = _slots(spec, recipe, settings)
    if recipe.quant == "none":
        return (_gpu("frozen linears", number * settings.width, f"{weights} x {settings.width} B{of}"), *slots)
    size = int(frozen * sum(count * nf4_bytes(linear.weights) for linear, count in resident))
    return (
        _gpu("frozen linears", size, f"{weights} x (1/2 + 1/64 + 1/4096) B, rounded up per tensor{of}"),
        _gpu("NF4 offsets", 4 * tensors, f"{tensors} tensors x 4 B"),
        *slots,
    )


def _slots(spec: ModelSpec, recipe: Recipe, settings: Settings) -> tuple[LedgerLine, ...]:
    returning = returning_bytes(spec, recipe, settings.dtype)
    if not settings.streamed and not returning:
        return ()
    place = placed(spec, settings)
    blob, slots = max([returning, *blobs(spec, recipe, settings, place.streamed)]), SLOTS if returning else place.slots
    return (_gpu("streaming slots", slots * blob, f"{slots} x {blob:,} B, the largest layer"),)


def tables(spec: ModelSpec, recipe: Recipe, settings: Settings, device: str) -> tuple[LedgerLine, ...]:
    """Frozen embedding, head, norms and biases, all in the compute dtype."""
    c, trained = settings.width, trains_tables(spec, recipe)
    table = f"V {spec.vocab} x h {spec.hidden} x {c} B"
    with_masters = active_layers(spec, recipe) if recipe.method in CHANGES_MODEL else 0
    frozen = Fraction(spec.num_layers - with_masters, spec.num_layers)
    small = int(frozen * sum(count * (layer.params - layer.weights) for layer, count in spec.shapes))
    small += 0 if trained else spec.hidden
    small -= sum(size * count for size, count in _norms(spec)) if recipe.train_norms else 0
    norms = _gpu("norms and biases", small * c, f"{small:,} x {c} B")
    if trained:
        return (norms,)
    if recipe.train_embeddings:
        return _gpu("head", spec.head.params * c, table), norms
    if spec.tied:
        return _gpu("embedding, tied to the head", spec.embedding_params * c, table), norms
    where = HOST if device == "cuda" else GPU
    embedding = LedgerLine("embedding", where, spec.embedding_params * c, table)
    return embedding, _gpu("head", spec.head.params * c, table), norms


def _norms(spec: ModelSpec) -> list[tuple[int, int]]:
    """Sizes of the norms, and how many there are of each."""
    of_heads = [(spec.head_dim, 2 * spec.num_layers)] if spec.qk_norm else []
    return [(spec.hidden, 2 * spec.num_layers + 1), *of_heads]


def _trained_embedding(spec: ModelSpec, recipe: Recipe, device: str) -> tuple[LedgerLine, ...]:
    """A table in fp32, and of the rows that were seen, at most all of them, the gradient and AdamW's moments."""
    if not recipe.train_embeddings:
        return ()
    where, size = HOST if device == "cuda" else GPU, spec.embedding_params
    table = f"V {spec.vocab} x h {spec.hidden}"
    return (
        LedgerLine("embedding, trained", where, 4 * size, f"{table} x 4 B"),
        LedgerLine("embedding gradient", where, 4 * size + 8 * spec.vocab, f"at most {table} x 4 B, V x 8 B"),
        LedgerLine("embedding moments", where, 8 * size + 12 * spec.vocab, f"at most {table} x 8 B, V x 12 B"),
    )


def _adapters(spec: ModelSpec, recipe: Recipe, settings: Settings) -> tuple[LedgerLine, ...]:
    layers, norms = adapting_layers(spec, recipe), _norms(spec) if recipe.train_norms else []
    of = f"rank {recipe.lora_r}" + " and norms" * recipe.train_norms
    weights = elements(adapter_factors(spec, recipe) + norms)
    factors = adapter_factors(spec, recipe, layers) + norms if layers else []
    trained = elements(factors)
    states = sum(count * optimizer_bytes(size, settings.optimizer) for size, count in factors)
    return (
        _gpu("adapter weights", 4 * weights, f"{weights:,} x 4 B ({of})"),
        _gpu("adapter gradients", 4 * trained, f"{trained:,} x 4 B"),
        _gpu("optimizer states", states, f"{trained:,} x {state_bytes(settings)} ({settings.optimizer})"),
    )


def _activations(spec: ModelSpec, recipe: Recipe, settings: Settings) -> tuple[LedgerLine, ...]:
    """The batch, and what the layers' forward passes leave for the backward pass."""
    tokens, c, h = settings.tokens, settings.width, spec.hidden
    at_once = settings.at_once
    together = f"{at_once} micro-batches x T {tokens}" if at_once > 1 else f"T {tokens}"
    batch = _gpu(
        "batch",
        at_once * tokens * (3 * 8 + 2 * spec.head_dim * c),
        f"{together} x (3 x 8 B + rotary 2 x {spec.head_dim} x {c} B)",
    )
    # Where micro-batches pass a layer together, the ends of the last one, their gradients, and those on the way wait;
    # the gradient of the one in the layer is counted there.
    waiting = (3 * at_once - 1) * tokens * h * c if at_once > 1 else 0
    ends = _gpu("micro-batches that wait", waiting, f"(3 x {at_once} - 1) x T {tokens} x h {h} x {c} B")
    if settings.offload:
        in_use = _gpu("layer inputs in use", 2 * tokens * h * c, f"2 buffers x T {tokens} x h {h} x {c} B")
        return batch, ends, in_use
    if settings.recompute == "layer":
        formula = f"L {spec.num_layers} x {together} x h {h} x {c} B"
        return batch, ends, _gpu("layer inputs", at_once * spec.num_layers * tokens * h * c, formula)
    kept = [(saved_bytes(layer, spec, recipe, c, trained), count) for layer, count, trained in _layers(spec, recipe)]
    in_mlps = settings.recompute == "none"
    per_token = sum(count * (outside + (inside if in_mlps else h * c)) for (outside, inside), count in kept)
    formula = f"T {tokens} x {per_token:,} B in {spec.num_layers} layers"
    casts = sum(count * _casts(layer, recipe, c, in_mlps) for layer, count in spec.shapes)
    return (
        batch,
        _gpu("layer activations", tokens * per_token, formula),
        _gpu("adapter weights in use", casts, f"those of {spec.num_layers} layers in {c} B each"),
    )


def _casts(layer: LayerSpec, recipe: Recipe, c: int, with_mlp: bool = True) -> int:
    """Bytes of a layer's adapter weights in the compute dtype, which backward keeps where that is not fp32."""
    linears = [linear for linear in layer.linears if adapted(linear, recipe) and (with_mlp or _outside(linear))]
    cast = c < 4 and adapter_kind(recipe.method)
    return sum(recipe.lora_r * (n.in_features + n.out_features) * c for n in linears) if cast else 0


def _outside(linear: LinearSpec) -> bool:
    return not linear.name.startswith("mlp.")


def _loss(spec: ModelSpec, recipe: Recipe, settings: Settings, trained: int) -> tuple[LedgerLine, ...]:
    """Head and loss in chunks of rows: one chunk of logits, which its gradient overwrites, and the hidden states; of a
    trained head the gradient so far, and a chunk's.
    """
    tokens, c, h = settings.tokens, settings.width, spec.hidden
    head, tables = spec.head.weights, trains_tables(spec, recipe)
    rows = min(trained, max(LOSS_MIN_ROWS, LOSS_CHUNK_BYTES // (4 * spec.vocab)))
    per_logit = 4 + (c if c < 4 else 0)
    chunk = rows * (spec.vocab * per_logit + 2 * h * c)
    # A chunk's gradient is made when the float32 copy of half-precision logits is gone.
    grads = 4 * head + max(0, gradient_bytes(head, c) - rows * spec.vocab * (per_logit - c))
    leaving = settings.offload  # the last layer's input, on its way to the host
    held = 2 + leaving + (tables or recipe.train_norms)  # what a trained norm made of its input
    wide = 4 if settings.mlp_tiles == 1 else c
    states = f"T {tokens} x h {h} x ({wide} B norm input + {held} x {c} B: output, gradient{', leaving' * leaving})"
    return (
        _gpu("head's gradient", tables * grads, f"V {spec.vocab} x h {h}, so far and of a chunk"),
        _gpu("loss chunk", chunk, f"{rows} rows x (V {spec.vocab} x {per_logit} B + h {h} x 2 x {c} B)"),
        _gpu("final hidden states and gradient", tokens * h * (wide + held * c), states),
    )


def _norm_backward(spec: ModelSpec, settings: Settings) -> LedgerLine:
    """The final norm's backward pass: its input and five temporaries in fp32, and the incoming gradient."""
    tokens, c, h = settings.tokens, settings.width, spec.hidden
    per_number = 6 * 4 + (c if c < 4 else 0)
    return _gpu("final norm's gradients", tokens * h * per_number, f"T {tokens} x h {h} x {per_number} B")


def _layer_backward(spec: ModelSpec, recipe: Recipe, settings: Settings) -> tuple[LedgerLine, ...]:
    """The live layer: what is computed again, and the widest moment of the MLP's backward pass."""
    layer = max((layer for layer, _ in spec.shapes), key=lambda layer: layer.weights)
    if settings.mlp_tiles > 1:
        kept, casts = saved_bytes(layer, spec, recipe, settings.width), _casts(layer, recipe, settings.width)
        tile = _mlp_gradients("tile gradients", layer, recipe, settings.tile, 1, settings.width)
        on_o = any(adapted(linear, recipe) for linear in layer.linears if linear.leaf == "o_proj")
        return tiled_backward(layer, spec.hidden, settings, kept, casts, on_o, tile)
    tokens, c, h = settings.tokens, settings.width, spec.hidden
    down = next(linear for linear in layer.linears if linear.leaf == "down_proj")
    outside, inside = saved_bytes(layer, spec, recipe, c)  # the last layer is trained too, or may be
    again = {"none": 0, "mlp": inside - h * c, "layer": outside + inside}[settings.recompute]
    if settings.recompute == "layer" and c == 4:
        again -= 4 * h  # the first norm keeps the layer input itself, which is counted with the layer inputs
    lines = [_gpu("layer computed again", tokens * again, f"T {tokens} x {again:,} B")]
    if recipe.method not in WEIGHTS and settings.recompute != "none":
        lines.append(_gpu("its adapter weights", _casts(layer, recipe, c), f"in {c} B each"))
    edges = 1 + (settings.recompute != "none")
    lines += _mlp_gradients("layer gradients", layer, recipe, tokens, edges, c)
    if recipe.method in WEIGHTS:
        grads, formula = gradient_bytes(down.weights, c), f"down_proj: {down.weights:,} x {4 if c == 4 else c + 4} B"
        if settings.recompute == "layer":  # a layer's are handed on together, when what was in the MLP is gone
            gone = tokens * inside + gpu_bytes(lines[-1:]) - (edges + 2) * tokens * h * c
            grads, formula = max(grads, 4 * layer.params - gone), f"up to a layer's {layer.params:,} x 4 B"
        lines.append(_gpu("weight gradients on their way", grads, formula))
    return tuple(lines)


def _mlp_gradients(
    what: str, layer: LayerSpec, recipe: Recipe, tokens: int, edges: int, c: int
) -> tuple[LedgerLine, ...]:
    """What the MLP's backward pass adds at its widest moment, ``edges`` hidden states besides the wide tensors."""
    down = next(linear for linear in layer.linears if linear.leaf == "down_proj")
    ffn, h = down.in_features, down.out_features
    # down's adapter gives its share of the input's gradient first, and then has no use for its own input.
    on_down = adapted(down, recipe) and not recipe.lora_dropout
    quantised = recipe.quant == "nf4" and recipe.method not in WEIGHTS
    weight = down.weights * c + 4 * -(-down.weights // BLOCK) if quantised else 0
    at_down, at_gate = (1 + on_down) * tokens * ffn * c + weight, 3 * tokens * ffn * c
    wide = f"T {tokens} x ({edges} x h {h} + {3 - on_down if at_gate > at_down else 1} x FFN {ffn}) x {c} B"
    size = tokens * (edges * h - on_down * ffn) * c + (at_gate if at_gate > at_down else at_down - weight)
    lines = [_gpu(what, size, wide)]
    if weight and at_gate <= at_down:
        lines.append(_gpu("dequantised weight", weight, f"down_proj: {down.weights:,} x ({c} + 4/{BLOCK}) B"))
    return tuple(lines)


def host_lines(spec: ModelSpec, recipe: Recipe, settings: Settings, device: str) -> tuple[LedgerLine, ...]:
    """What the host holds, and the store on disk."""
    largest = max(spec.embedding_params, *(linear.weights for linear, _ in _linears(spec)))
    c, tokens = settings.width, settings.tokens
    lines = [
        LedgerLine("process and data", HOST, PROCESS_BYTES[device], "interpreter, libraries, tokenised data"),
        LedgerLine("largest tensor, while it loads", HOST, largest * c, f"{largest:,} x {c} B"),
    ]
    if settings.offload:
        at_once = settings.at_once
        size = at_once * spec.num_layers * tokens * spec.hidden * c
        formula = f"{at_once} micro-batches x L {spec.num_layers} x T {tokens} x h {spec.hidden} x {c} B"
        lines.append(LedgerLine("layer inputs, offloaded", HOST, size, formula))
    adapters = elements(adapter_factors(spec, recipe, 1)) if recipe.method in SAMPLED else 0
    lines += waiting_layers(spec, recipe, settings, adapters)
    if settings.streamed:
        place, every = placed(spec, settings), range(spec.num_layers)
        held, read, store = (
            blobs(spec, recipe, settings, layers) for layers in (place.in_host_memory, place.on_disk, every)
        )
        lines.append(LedgerLine("streamed layers", HOST, sum(held), summed(held)))
        ahead, largest = min(SLOTS, len(read)), max(read, default=0)
        lines.append(LedgerLine("read-ahead", HOST, ahead * largest, f"{ahead} buffers x {largest:,} B"))
        rest = spec.params - spec.linear_params  # as the checkpoint has it
        in_store = f"{summed(store)} + embedding, head, norms {rest:,} x 2 B"
        lines.append(LedgerLine("store", DISK, sum(store) + 2 * rest, in_store))
    return tuple(lines)
