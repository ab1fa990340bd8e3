"""The parts of a decoder layer in whose place transformers' stand: attention around our projections, and norms.

On the CPU they compute what transformers computes, bit for bit; gradients may round otherwise. Where Triton runs, a
block's projections are one function and the rest are our kernels.

Shapes: B rows, T tokens, H hidden size, Hq and Hkv heads, D head dimension.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from effitrain.kernels.backend import usable
from effitrain.kernels.lora_linear import Linear
from effitrain.kernels.lora_qkv import lora_qkv
from effitrain.kernels.rms_norm import rms_norm
from effitrain.kernels.rope import rope
from effitrain.model.attention import attention
from effitrain.model.tiles import in_tiles


class Norm(nn.Module):
    """A norm of each token's hidden state, with the weight of the stock one.

    ``tile``: tokens that are normed at a time; None for all. ``deferred``: the block that follows norms its tiles
    itself, and the norm hands its input on.
    """

    def __init__(self, weight: nn.Parameter, eps: float):
        super().__init__()
        self.weight, self.eps = weight, eps
        self.tile: int | None = None
        self.deferred = False

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] to [..., H]."""
        if self.deferred:
            return x
        if self.tile is None:
            return self.compute(x)
        return in_tiles(self.compute, x, trainable(self), self.tile)

    def compute(self, x: Tensor) -> Tensor:
        """The norm itself."""
        raise NotImplementedError


class RMSNorm(Norm):
    """Llama's norm; a trained weight, in float32, is rounded to the dtype of x."""

    def compute(self, x: Tensor) -> Tensor:
        """``w x / rms(x)``."""
        return rms_norm(x, self.weight.to(x.dtype), self.eps)


class GemmaNorm(Norm):
    """Gemma's, which scales by ``1 + w`` in float32."""

    def compute(self, x: Tensor) -> Tensor:
        """``(1 + w) x / rms(x)``."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * (1.0 + self.weight.float())).type_as(x)


def trainable(*modules: nn.Module) -> list[Tensor]:
    """The parameters of ``modules`` that get gradients."""
    return [p for module in modules for p in module.parameters() if p.requires_grad]


class SelfAttention(nn.Module):
    """Attention of the Llama families: projections, norms of queries and keys if there are any, rotation, attention.

    ``shifted_group``: tokens of a segment of shifted sparse attention in training; None for whole samples.
    """

    def __init__(self, stock: Any):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = stock.q_proj, stock.k_proj, stock.v_proj, stock.o_proj
        self.q_norm, self.k_norm = getattr(stock, "q_norm", None), getattr(stock, "k_norm", None)
        self.head_dim, self.scaling, self.layer_idx = stock.head_dim, stock.scaling, stock.layer_idx
        # Qwen decides by layer and notes it in the module, Mistral has one for all in its config, Llama has none.
        config_window = getattr(stock.config, "sliding_window", None) if stock.config.model_type == "mistral" else None
        self.shifted_group: int | None = None
        self.window = getattr(stock, "sliding_window", config_window)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: None = None,
        past_key_values: Any = None,
        segments: Sequence[int] | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """[B, T, H] to [B, T, H], and None in the place of the scores.

        Args:
            hidden_states: the layer's normed input.
            position_embeddings: cos and sin [B or 1, T, D].
            attention_mask: None; ``segments`` takes its place.
            past_key_values: transformers' cache, for generation.
            segments: lengths of the samples in a flat row.
        """
        query, key, value = (t.unflatten(-1, (-1, self.head_dim)) for t in self._project(hidden_states))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = (rope(t, *position_embeddings).transpose(1, 2) for t in (query, key))
        value = value.transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        group = self.shifted_group if self.training else None
        kwargs = {"segments": segments, "scaling": self.scaling, "sliding_window": self.window, "shifted_group": group}
        out, _none = attention(self, query, key, value, None, **kwargs)
        return self.o_proj(out.flatten(2)), None

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        linears = operands("lora_qkv", x, self.q_proj, self.k_proj, self.v_proj)
        if linears is not None:
            return lora_qkv(x, *linears)
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


def operands(kernel: str, x: Tensor, *projections: Any) -> list[Linear] | None:
    """The projections as ``kernel`` takes them; None where it does not run on ``x``, an adapter has another form, or
    somebody watches or changes the output of one of them, which a kernel for the block never shows.
    """
    if not usable(kernel, x) or any(projection._forward_hooks for projection in projections):
        return None
    linears = [projection.as_linear() for projection in projections]
    return None if None in linears else linears


def replace_norms(model: nn.Module) -> None:
    """Put our norms in the place of every one that computes what Llama's or Gemma's does."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "variance_epsilon"):
            model.set_submodule(name, RMSNorm(module.weight, module.variance_epsilon))
        elif type(module).__name__ == "GemmaRMSNorm":
            model.set_submodule(name, GemmaNorm(module.weight, module.eps))
