"""The backward pass of a layer whose norms and MLP take tiles of tokens (``model/tiles.py``): what it keeps, in bytes.

Letters in formulas: T tokens of a micro-batch, h hidden size; ``c`` is the width of the compute dtype.
"""

from collections.abc import Sequence

from effitrain.core.ledger import GPU, LedgerLine, Settings, gpu_bytes
from effitrain.core.spec import LayerSpec


def tiled_backward(
    layer: LayerSpec, h: int, settings: Settings, kept: tuple[int, int], casts: int, on_o: bool,
    gradients: Sequence[LedgerLine],
) -> tuple[LedgerLine, ...]:  # fmt: skip
    """The larger of two moments: that of a tile of the MLP, and that of the attention before it.

    Args:
        layer: the live one.
        h: hidden size.
        settings: with tiles.
        kept: bytes a token that the layer keeps without tiles: outside the MLP, and in it.
        casts: bytes of its adapters in the compute dtype.
        on_o: whether ``o_proj`` is adapted.
        gradients: of a tile of the MLP.
    """
    tokens, tile, c = settings.tokens, settings.tile, settings.width
    attention = kept[0] - 2 * (4 * h + 4)  # norms keep their input alone, which is there anyway
    again, inside = attention + h * c, kept[1] + (4 * h + 4 if c < 4 else 4)
    rows = {linear.leaf: linear.out_features for linear in layer.linears}
    # At o_proj: its adapter's share of the input's gradient, its own, and their sum; or, behind it, the gradients of
    # queries, keys and values, and that of the output.
    wide = 3 * rows["q_proj"] if on_o else 2 * (rows["q_proj"] + rows["k_proj"])
    adapters = LedgerLine("its adapter weights", GPU, casts, f"in {c} B each")
    at_mlp = (
        LedgerLine("layer computed again", GPU, tokens * again, f"T {tokens} x {again:,} B"),
        adapters,
        LedgerLine("layer gradients", GPU, 3 * tokens * h * c, f"T {tokens} x 3 x h {h} x {c} B"),
        LedgerLine("tile computed again", GPU, tile * inside, f"{tile} tokens x {inside:,} B"),
        *gradients,
    )
    formula = f"T {tokens} x (3 x h {h} + {wide}) x {c} B"
    at_attention = (
        LedgerLine("layer computed again", GPU, tokens * attention, f"T {tokens} x {attention:,} B"),
        adapters,
        LedgerLine("layer gradients", GPU, tokens * (3 * h + wide) * c, formula),
    )
    return max(at_mlp, at_attention, key=gpu_bytes)
