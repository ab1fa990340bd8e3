"""What training weights of the model itself takes, in elements and bytes: float32 masters, gradients and states."""

from collections.abc import Iterator

from effitrain.core.errors import InputError
from effitrain.core.layout import layer_layout
from effitrain.core.ledger import GPU, HOST, LedgerLine, Settings
from effitrain.core.methods import SAMPLED, WEIGHTS
from effitrain.core.recipe import Recipe
from effitrain.core.spec import LayerSpec, ModelSpec

# bitsandbytes' 8-bit optimizer keeps tensors below this in 32 bits, and a 4-byte scale per 256 values of a moment.
MIN_8BIT, STATE_BLOCK = 4096, 256
EMBEDDINGS_UP_TO = 3e9  # parameters; of larger models embedding, head and their states outweigh a few layers


def check_layers(spec: ModelSpec, recipe: Recipe) -> None:
    """Refuse a model whose layers cannot take turns as the recipe asks.

    Raises:
        InputError: layers of different shapes, or fewer than are to be trained at a time.
    """
    if recipe.method in SAMPLED and len(spec.shapes) > 1:
        raise InputError(
            f"The layers of {spec.name} have different widths, and LISA trains them by turns in the same memory.",
            "The model was pruned.",
            "Use --method lora or full.",
        )
    if recipe.method in SAMPLED and recipe.lisa_layers > spec.num_layers:
        raise InputError(
            f"--lisa-layers {recipe.lisa_layers}: {spec.name} has {spec.num_layers} layers.",
            next_step=f"Name at most {spec.num_layers}, or use --method full.",
        )


def active_layers(spec: ModelSpec, recipe: Recipe) -> int:
    """Layers whose own weights are trained at a time."""
    if recipe.method not in WEIGHTS:
        return 0
    return min(recipe.lisa_layers, spec.num_layers) if recipe.method in SAMPLED else spec.num_layers


def adapting_layers(spec: ModelSpec, recipe: Recipe) -> int:
    """Layers whose adapters are trained at a time."""
    if recipe.method in WEIGHTS:
        return 0
    return min(recipe.lisa_layers, spec.num_layers) if recipe.method in SAMPLED else spec.num_layers


def busy_layers(spec: ModelSpec, recipe: Recipe) -> int:
    """Layers of which anything is trained at a time."""
    return active_layers(spec, recipe) + adapting_layers(spec, recipe)


def trains_tables(spec: ModelSpec, recipe: Recipe) -> bool:
    """Whether the embedding, the head and the last norm are trained."""
    if recipe.method == "lisa" and recipe.lisa_train_embeddings is None:
        return spec.params <= EMBEDDINGS_UP_TO
    return recipe.method == "full" or bool(recipe.lisa_train_embeddings)


def visited_layers(spec: ModelSpec, recipe: Recipe) -> int:
    """The most layers that LISA comes to in a run; all of them where its length is not known."""
    rounds = -(-recipe.max_steps // recipe.lisa_interval) if recipe.max_steps else spec.num_layers
    return min(spec.num_layers, rounds * recipe.lisa_layers) if recipe.method in SAMPLED else 0


def returning_bytes(spec: ModelSpec, recipe: Recipe, dtype: str) -> int:
    """Bytes of a layer that comes back from the host in ``dtype`` because LISA has trained it; 0 where none does: what
    was trained is never quantised again.
    """
    if recipe.method != "lisa" or recipe.quant == "none":
        return 0
    return layer_layout(spec.layers[0], lambda linear: dtype).nbytes


def layer_tensors(layer: LayerSpec, spec: ModelSpec, recipe: Recipe) -> list[int]:
    """Elements of every tensor of a layer that is trained: matrices, biases and norms, of which a LoRA holds none."""
    matrices = [linear.weights for linear in layer.linears]
    if recipe.method == "lisa-delta":
        return matrices
    biases = [linear.out_features for linear in layer.linears if linear.bias]
    return [*matrices, *biases, spec.hidden, spec.hidden, *([spec.head_dim] * 2 if spec.qk_norm else [])]


def trained_tensors(spec: ModelSpec, recipe: Recipe) -> list[tuple[int, int]]:
    """Elements of the tensors that are trained at a time, and how many there are of each."""
    active, found = active_layers(spec, recipe), []
    for layer, count in spec.shapes if active == spec.num_layers else [(spec.layers[0], active)]:
        found += [(size, count) for size in layer_tensors(layer, spec, recipe)]
    if trains_tables(spec, recipe):
        found += [(spec.embedding_params, 1 if spec.tied else 2), (spec.hidden, 1)]
    return found


def saved_by_norms(layer: LayerSpec, spec: ModelSpec, c: int) -> int:
    """Bytes a token that a layer's trained norms keep beside what frozen ones do: their normed inputs."""
    rows = {linear.leaf: linear.out_features for linear in layer.linears}
    return c * (2 * spec.hidden + (rows["q_proj"] + rows["k_proj"] if spec.qk_norm else 0))


def gradient_bytes(weights: int, c: int) -> int:
    """Bytes while the gradient of a matrix is made: as the product of activations, then in float32."""
    return weights * (4 if c == 4 else c + 4)


def waiting_layers(spec: ModelSpec, recipe: Recipe, settings: Settings, adapters: int) -> Iterator[LedgerLine]:
    """What LISA keeps in host memory of layers between their turns, of as many as a run can come to; ``adapters`` is
    how many elements those of a layer have.
    """
    layers, blob = visited_layers(spec, recipe), returning_bytes(spec, recipe, settings.dtype)
    if recipe.method == "lisa" and settings.streamed:
        blob = layer_layout(spec.layers[0], lambda linear: settings.dtype).nbytes
    if blob:
        yield LedgerLine("trained layers", HOST, layers * blob, f"{layers} layers x {blob:,} B")
    if recipe.lisa_state == "keep-host":
        one = sum(layer_tensors(spec.layers[0], spec, recipe)) if recipe.method in WEIGHTS else adapters
        yield LedgerLine("states of layers that left", HOST, 8 * layers * one, f"{layers} layers x {one:,} x 8 B")


def master_lines(spec: ModelSpec, recipe: Recipe, settings: Settings) -> tuple[LedgerLine, ...]:
    """Weights of the model itself that are trained."""
    tensors = trained_tensors(spec, recipe)
    weights = elements(tensors)
    states = sum(count * optimizer_bytes(size, settings.optimizer) for size, count in tensors)
    where = f"{active_layers(spec, recipe)} layers" + (", embedding, head" if trains_tables(spec, recipe) else "")
    return (
        LedgerLine("trained weights", GPU, 4 * weights, f"{weights:,} x 4 B ({where})"),
        LedgerLine("gradients", GPU, 4 * weights, f"{weights:,} x 4 B"),
        LedgerLine("optimizer states", GPU, states, f"{weights:,} x {state_bytes(settings)} ({settings.optimizer})"),
    )


def elements(tensors: list[tuple[int, int]]) -> int:
    """Elements of tensors, given by size and number."""
    return sum(size * count for size, count in tensors)


def optimizer_bytes(size: int, optimizer: str) -> int:
    """Two moments of a tensor of ``size``: fp32, or 8-bit with scales. Paged ones count on the device, where used."""
    if optimizer == "adamw" or size < MIN_8BIT:
        return 8 * size
    return 2 * size + 2 * 4 * -(-size // STATE_BLOCK)


def state_bytes(settings: Settings) -> str:
    """The same for each element, as the ledger tells it."""
    return "8 B" if settings.optimizer == "adamw" else f"(2 + 8/{STATE_BLOCK}) B, 8 B in tensors below {MIN_8BIT}"
