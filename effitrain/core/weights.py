"""What training weights of the model itself takes, in elements and bytes: float32 masters, gradients and states."""

from effitrain.core.recipe import Recipe
from effitrain.core.spec import LayerSpec, ModelSpec


def active_layers(spec: ModelSpec, recipe: Recipe) -> int:
    """Layers whose own weights are trained at a time."""
    return spec.num_layers if recipe.method == "full" else 0


def trains_tables(spec: ModelSpec, recipe: Recipe) -> bool:
    """Whether the embedding, the head and the last norm are trained."""
    return recipe.method == "full"


def layer_tensors(layer: LayerSpec, spec: ModelSpec) -> list[int]:
    """Elements of every tensor of a layer: matrices, biases and norms."""
    matrices = [linear.weights for linear in layer.linears]
    biases = [linear.out_features for linear in layer.linears if linear.bias]
    return [*matrices, *biases, spec.hidden, spec.hidden, *([spec.head_dim] * 2 if spec.qk_norm else [])]


def trained_tensors(spec: ModelSpec, recipe: Recipe) -> list[tuple[int, int]]:
    """Elements of the tensors that are trained at a time, and how many there are of each."""
    active, found = active_layers(spec, recipe), []
    for layer, count in spec.shapes if active == spec.num_layers else [(spec.layers[0], active)]:
        found += [(size, count) for size in layer_tensors(layer, spec)]
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
