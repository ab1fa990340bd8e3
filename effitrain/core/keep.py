"""What survived structured pruning, per layer and axis: the value that ties a small model to its full-size base."""

from collections.abc import Iterable
from dataclasses import dataclass

from effitrain.core.errors import InputError
from effitrain.core.spec import Axis, ModelSpec, Widths


@dataclass(frozen=True)
class LayerKeep:
    """Indices of what is kept in one layer, ascending: FFN channels, and KV heads with the query heads they serve."""

    ffn: tuple[int, ...]
    kv_heads: tuple[int, ...]


@dataclass(frozen=True)
class KeepMap:
    """What is kept of a full-size model.

    Attributes:
        ffn: FFN channels of a full layer.
        num_heads: its query heads.
        num_kv_heads: its KV heads; head j serves the query heads from ``j * num_heads / num_kv_heads`` on.
        head_dim: rows of a head.
        layers: what survived in each.
        base: name of the full-size model.
        fingerprint: of its weights.
    """

    ffn: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerKeep, ...]
    base: str
    fingerprint: str

    @staticmethod
    def of(spec: ModelSpec, layers: Iterable[LayerKeep], base: str, fingerprint: str) -> "KeepMap":
        """The map of a model of ``spec``."""
        return KeepMap(spec.ffn, spec.num_heads, spec.num_kv_heads, spec.head_dim, tuple(layers), base, fingerprint)

    @property
    def parts(self) -> str:
        """What was cut anywhere, as ``--prune-parts`` names it; both where nothing was."""
        lost = {"ffn": min(w.ffn for w in self.widths) < self.ffn,
                "kv": min(w.kv_heads for w in self.widths) < self.num_kv_heads}  # fmt: skip
        return "+".join(part for part, cut in lost.items() if cut) or "+".join(lost)

    @property
    def widths(self) -> tuple[Widths, ...]:
        """Sizes of the pruned layers."""
        return tuple(Widths(len(layer.ffn), len(layer.kv_heads)) for layer in self.layers)

    def full_size(self, axis: Axis) -> int:
        """Length of a prunable axis in the full-size model."""
        return {
            Axis.FFN: self.ffn,
            Axis.KV_HEADS: self.num_kv_heads * self.head_dim,
            Axis.HEADS: self.num_heads * self.head_dim,
        }[axis]

    def indices(self, layer: int, axis: Axis) -> list[int] | None:
        """Rows or columns kept along ``axis`` in a layer, ascending; None where all of them are.

        A KV head is ``head_dim`` rows of k and v and, of q and of o's columns, those of the query heads it serves.
        """
        kept = self.layers[layer]
        if axis == Axis.FFN and len(kept.ffn) < self.ffn:
            return list(kept.ffn)
        if axis in (Axis.KV_HEADS, Axis.HEADS) and len(kept.kv_heads) < self.num_kv_heads:
            rows = self.full_size(axis) // self.num_kv_heads
            return [head * rows + row for head in kept.kv_heads for row in range(rows)]
        return None

    def check(self, spec: ModelSpec) -> None:
        """Refuse the map of another model.

        Raises:
            InputError: sizes or layers differ from those of ``spec``.
        """
        mine = (len(self.layers), self.ffn, self.num_heads, self.num_kv_heads, self.head_dim)
        model = (spec.num_layers, spec.ffn, spec.num_heads, spec.num_kv_heads, spec.head_dim)
        if mine != model:
            sizes = "layers, FFN channels, query heads, KV heads, head size"
            raise InputError(
                f"The keep map is of a model with {mine} {sizes}; {spec.name} has {model}.",
                "It belongs to another model.",
                f"Name the model it was made from: {self.base}.",
            )
