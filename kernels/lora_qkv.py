"""Queries, keys and values with low-rank updates as one function.

Formula: of each, ``lora_linear``'s;  dx = sum of the three, in one buffer.

Shapes: x [..., H]; q [..., Hq D], k and v [..., Hkv D]. Saved for backward: x once, and low [tokens, r] of each.
"""

from torch import Tensor

from effitrain.kernels import lora_linear
from effitrain.kernels.backend import usable
from effitrain.kernels.lora_linear import Linear, lora_linears


def reference(x: Tensor, query: Linear, key: Linear, value: Linear) -> tuple[Tensor, Tensor, Tensor]:
    """The formula, left to autograd."""
    q, k, v = (lora_linear.reference(x, linear) for linear in (query, key, value))
    return q, k, v


def lora_qkv(x: Tensor, query: Linear, key: Linear, value: Linear) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of ``x``, as the projections give them; off Triton's devices ``reference``."""
    if not (x.numel() and usable("lora_qkv", x)):
        return reference(x, query, key, value)
    q, k, v = lora_linears(x, (query, key, value))
    return q, k, v
