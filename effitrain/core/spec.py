"""The shape of a model, read from its config.json alone: every linear with the axes its rows and columns lie on."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from typing import Any

from effitrain.core.errors import InputError
from effitrain.core.families import FAMILIES, Family, family_of, is_size, read_sizes
from effitrain.core.paths import path_of


class Axis(StrEnum):
    """What a side of a weight runs over; two sides on one axis shrink together."""

    MODEL = "model"
    HEADS = "heads"
    KV_HEADS = "kv_heads"
    FFN = "ffn"
    VOCAB = "vocab"
    RANK = "rank"


PRUNABLE = frozenset({Axis.HEADS, Axis.KV_HEADS, Axis.FFN})


@dataclass(frozen=True)
class LinearSpec:
    """One linear ``y = x W^T (+ b)`` with W ``[out_features, in_features]``; ``name`` is its path inside the layer."""

    name: str
    out_axis: Axis
    in_axis: Axis
    out_features: int
    in_features: int
    bias: bool

    @property
    def leaf(self) -> str:
        """Last part of the name, e.g. ``q_proj``."""
        return self.name.rpartition(".")[2]

    @property
    def weights(self) -> int:
        """Elements of W."""
        return self.out_features * self.in_features

    @property
    def params(self) -> int:
        """Elements of W and of the bias."""
        return self.weights + (self.out_features if self.bias else 0)


@dataclass(frozen=True)
class Widths:
    """What structured pruning changes of a layer: its FFN channels and its KV heads, each with its query heads."""

    ffn: int
    kv_heads: int


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer; ``other_params`` counts what is in no linear: the norms."""

    index: int
    linears: tuple[LinearSpec, ...]
    other_params: int

    @property
    def weights(self) -> int:
        """Elements of the layer's matrices."""
        return sum(linear.weights for linear in self.linears)

    @property
    def params(self) -> int:
        """Elements of matrices, biases and norms."""
        return sum(linear.params for linear in self.linears) + self.other_params

    def resized(self, sizes: Mapping[Axis, int]) -> "LayerSpec":
        """The layer with the sides on the axes of ``sizes`` that long."""
        linears = [
            replace(
                linear,
                out_features=sizes.get(linear.out_axis, linear.out_features),
                in_features=sizes.get(linear.in_axis, linear.in_features),
            )
            for linear in self.linears
        ]
        return replace(self, linears=tuple(linears))


@dataclass(frozen=True)
class ModelSpec:
    """A decoder of attention (q, k, v, o) and gated MLP (gate, up, down) layers.

    ``ffn``, ``num_heads`` and ``num_kv_heads`` are those of the full-size model; what a layer really has stands in
    its linears. ``tied``: the head is the embedding's transpose and holds no weights of its own.
    """

    name: str
    family: str
    hidden: int
    ffn: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    tied: bool
    layers: tuple[LayerSpec, ...]
    head: LinearSpec

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised head by head."""
        return FAMILIES[self.family].qk_norm

    @property
    def embedding_params(self) -> int:
        """Elements of the embedding."""
        return self.vocab * self.hidden

    @cached_property
    def shapes(self) -> tuple[tuple[LayerSpec, int], ...]:
        """The different layers, each by its first, and how many there are of it."""
        first = {(layer.linears, layer.other_params): layer for layer in reversed(self.layers)}
        counts = Counter((layer.linears, layer.other_params) for layer in self.layers)
        return tuple((first[shape], count) for shape, count in counts.items())

    @cached_property
    def kinds(self) -> tuple[int, ...]:
        """The place of each layer's shape in ``shapes``."""
        places = {(layer.linears, layer.other_params): kind for kind, (layer, _) in enumerate(self.shapes)}
        return tuple(places[layer.linears, layer.other_params] for layer in self.layers)

    @cached_property
    def linears(self) -> dict[str, LinearSpec]:
        """The decoder linears by their paths, as ``model.layers.3.mlp.down_proj``."""
        return {path_of(layer.index, linear.name): linear for layer in self.layers for linear in layer.linears}

    @property
    def linear_params(self) -> int:
        """Elements of the decoder linears' matrices: the frozen weights. Head and biases are not counted."""
        return sum(count * layer.weights for layer, count in self.shapes)

    @property
    def params(self) -> int:
        """Every parameter of the model, tied ones once."""
        head = 0 if self.tied else self.head.params
        return self.embedding_params + sum(count * layer.params for layer, count in self.shapes) + self.hidden + head

    @property
    def widths(self) -> tuple[Widths, ...]:
        """What each layer really has."""
        rows = [{linear.out_axis: linear.out_features for linear in layer.linears} for layer in self.layers]
        return tuple(Widths(sides[Axis.FFN], sides[Axis.KV_HEADS] // self.head_dim) for sides in rows)

    def resized(self, widths: Sequence[Widths]) -> "ModelSpec":
        """The model with layers of these widths, each KV head with its share of the query heads."""
        group = self.num_heads // self.num_kv_heads * self.head_dim
        resized: dict[tuple[tuple[LinearSpec, ...], Widths], tuple[LinearSpec, ...]] = {}  # many layers are alike
        for layer, width in zip(self.layers, widths, strict=True):
            if (layer.linears, width) not in resized:
                kv_rows, rows = width.kv_heads * self.head_dim, width.kv_heads * group
                sizes = {Axis.FFN: width.ffn, Axis.KV_HEADS: kv_rows, Axis.HEADS: rows}
                resized[layer.linears, width] = layer.resized(sizes).linears
        pairs = zip(self.layers, widths, strict=True)
        return replace(self, layers=tuple(replace(a, linears=resized[a.linears, width]) for a, width in pairs))

    def with_biases(self, paths: Collection[str]) -> "ModelSpec":
        """The model with a bias on the linears of these paths, as ``model.layers.3.mlp.down_proj``."""
        layers = [
            replace(
                layer,
                linears=tuple(
                    replace(linear, bias=linear.bias or path_of(layer.index, linear.name) in paths)
                    for linear in layer.linears
                ),
            )
            for layer in self.layers
        ]
        return replace(self, layers=tuple(layers))


WIDTHS_KEY, BIASES_KEY = "effitrain_widths", "effitrain_biases"


def spec_from_config(config: Mapping[str, Any], name: str) -> ModelSpec:
    """The shape of the model that ``config``, the content of a config.json, describes.

    Raises:
        InputError: a mixture of experts, a family not handled, or sizes that are missing or do not go together
            (all of them in one message).
    """
    family = family_of(config, name)
    sizes = read_sizes(config, family, name)
    hidden, heads, kv_heads, head_dim = (sizes[key] for key in ("hidden", "num_heads", "num_kv_heads", "head_dim"))
    linears = _linears(config, family, hidden, sizes["ffn"], heads * head_dim, kv_heads * head_dim)
    norms = 2 * hidden + (2 * head_dim if family.qk_norm else 0)
    layers = tuple(LayerSpec(index, linears, norms) for index in range(sizes.pop("num_layers")))
    head = LinearSpec("lm_head", Axis.VOCAB, Axis.MODEL, sizes["vocab"], hidden, False)
    tied = config.get("tie_word_embeddings")
    spec = ModelSpec(
        name=name,
        family=config["model_type"],
        tied=family.tied if tied is None else bool(tied),
        layers=layers,
        head=head,
        **sizes,
    )
    spec = spec.resized(_widths(config[WIDTHS_KEY], spec)) if WIDTHS_KEY in config else spec
    return spec.with_biases(_biases(config[BIASES_KEY], spec)) if BIASES_KEY in config else spec


def _widths(value: Any, spec: ModelSpec) -> list[Widths]:
    """The widths that a pruned model's config.json lists layer by layer."""
    try:
        widths = [Widths(*pair) for pair in zip(value["ffn"], value["kv_heads"], strict=True)]
        possible = all(
            is_size(w.ffn) and is_size(w.kv_heads) and w.ffn <= spec.ffn and w.kv_heads <= spec.num_kv_heads
            for w in widths
        )
    except (TypeError, KeyError, ValueError):
        possible = False
    if not possible or len(widths) != spec.num_layers:
        raise InputError(
            f"The {WIDTHS_KEY} of {spec.name} do not go with its {spec.num_layers} layers of {spec.ffn} FFN channels"
            f" and {spec.num_kv_heads} KV heads.",
            "Its config.json was changed by hand or is of another model.",
            "Prune the model again.",
        )
    return widths


def _biases(value: Any, spec: ModelSpec) -> list[str]:
    """The linears that a pruned model's config.json gives a bias of their own."""
    if not isinstance(value, list) or not spec.linears.keys() >= {*map(str, value)}:
        raise InputError(
            f"The {BIASES_KEY} of {spec.name} do not name linears of its {spec.num_layers} layers.",
            "Its config.json was changed by hand or is of another model.",
            "Prune the model again.",
        )
    return value


def pruned_config(config: Mapping[str, Any], small: ModelSpec) -> dict[str, Any]:
    """The config.json of ``small``, cut from the model of ``config``: transformers' own sizes where all layers have the
    same, else the full ones and a list of widths by layer, which only this project reads. So are biases that the
    family's linears do not have.
    """
    widths, group = small.widths, small.num_heads // small.num_kv_heads
    sizes: dict[str, Any] = {"head_dim": small.head_dim}  # what hidden_size / heads gives is wrong after pruning
    if len(set(widths)) == 1:
        sizes["intermediate_size"] = widths[0].ffn
        sizes["num_key_value_heads"] = widths[0].kv_heads
        sizes["num_attention_heads"] = group * widths[0].kv_heads
    else:
        sizes[WIDTHS_KEY] = {"ffn": [w.ffn for w in widths], "kv_heads": [w.kv_heads for w in widths]}
    config = {key: value for key, value in config.items() if key not in (WIDTHS_KEY, BIASES_KEY)}
    own = {linear.name for linear in spec_from_config(config, small.name).layers[0].linears if linear.bias}
    added = [path for path, linear in small.linears.items() if linear.bias and linear.name not in own]
    if added:
        sizes[BIASES_KEY] = added
    return {**config, **sizes}


def _linears(
    config: Mapping[str, Any], family: Family, hidden: int, ffn: int, q_size: int, kv_size: int
) -> tuple[LinearSpec, ...]:
    def has(bias: bool | str) -> bool:
        return bool(config.get(bias)) if isinstance(bias, str) else bias

    qkv, o, mlp = has(family.qkv_bias), has(family.o_bias), has(family.mlp_bias)
    return (
        LinearSpec("self_attn.q_proj", Axis.HEADS, Axis.MODEL, q_size, hidden, qkv),
        LinearSpec("self_attn.k_proj", Axis.KV_HEADS, Axis.MODEL, kv_size, hidden, qkv),
        LinearSpec("self_attn.v_proj", Axis.KV_HEADS, Axis.MODEL, kv_size, hidden, qkv),
        LinearSpec("self_attn.o_proj", Axis.MODEL, Axis.HEADS, hidden, q_size, o),
        LinearSpec("mlp.gate_proj", Axis.FFN, Axis.MODEL, ffn, hidden, mlp),
        LinearSpec("mlp.up_proj", Axis.FFN, Axis.MODEL, ffn, hidden, mlp),
        LinearSpec("mlp.down_proj", Axis.MODEL, Axis.FFN, hidden, ffn, mlp),
    )
