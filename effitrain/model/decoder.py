"""A causal language model ready to train: transformers' layers around our linears, attention and embedding.

Shapes: N tokens of a micro-batch, end to end; B, T rows and tokens with a cache; H hidden size; V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from effitrain.core.errors import InputError
from effitrain.core.spec import PRUNABLE, LinearSpec, ModelSpec
from effitrain.kernels.lora_mlp import lora_mlp
from effitrain.kernels.swiglu import Activation, swiglu
from effitrain.model import attention
from effitrain.model.blocks import Norm, SelfAttention, operands, replace_norms, trainable
from effitrain.model.embedding import Embedding
from effitrain.model.recompute import recompute
from effitrain.model.tiles import in_tiles
from effitrain.quant.linear import FrozenLinear
from effitrain.stream.offload import Offload
from effitrain.stream.streamer import Streamer


@dataclass(frozen=True)
class Rows:
    """What goes through the decoder at once.

    Attributes:
        input_ids: [N] with ``segments``, or [B, T].
        position_ids: of the same shape; they restart at each segment.
        segments: lengths of the samples in a flat row.
        cache: transformers' cache of earlier keys and values, for generation.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Sequence[int] | None = None
    cache: Any = None


_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu"}  # that have kernels


class GatedMLP(nn.Module):
    """``down(act(gate(x)) * up(x))``; with SiLU it keeps one wide tensor less for backward than stock code.

    ``recomputed``: keep the input alone for backward. ``tile``: tokens that are taken at a time, from their norm on;
    None for all.
    """

    def __init__(self, stock: nn.Module, act: str):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = stock.gate_proj, stock.up_proj, stock.down_proj
        self.act_fn = None if act == "silu" else stock.act_fn
        self.activation = _ACTIVATIONS.get(act)
        self.recomputed = False
        self.tile: int | None = None
        self._norm: tuple[Norm, ...] = ()  # in a tuple, for it is no part of this module

    @property
    def last(self) -> FrozenLinear:
        """The frozen linear whose output is the block's."""
        return next(m for m in self.down_proj.modules() if isinstance(m, FrozenLinear))  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] to [..., H]."""
        if self.tile is not None:
            return in_tiles(self._normed, x, trainable(self._norm[0], self), self.tile, self.last)
        if self.recomputed and torch.is_grad_enabled():
            return recompute(self._compute, x, trainable(self), self.last)
        return self._compute(x)

    def set_tile(self, tile: int | None, norm: Norm) -> None:
        """Take so many tokens at a time, and those through ``norm`` first, which then hands its input on."""
        self.tile, self._norm = tile, (norm,)
        norm.deferred = tile is not None

    def _normed(self, x: Tensor) -> Tensor:
        return self._compute(self._norm[0].compute(x))

    def _compute(self, x: Tensor) -> Tensor:
        linears = operands("lora_mlp", x, self.gate_proj, self.up_proj, self.down_proj)
        if linears is not None and self.activation is not None:
            return lora_mlp(x, linears[0], linears[1], linears[2], self.activation)
        gate, up = self.gate_proj(x), self.up_proj(x)  # type: ignore[operator]
        return self.down_proj(self.act_fn(gate) * up if self.act_fn else swiglu(gate, up))  # type: ignore[operator]


class Decoder(nn.Module):
    """transformers' decoder with its modules replaced in place, so that every module keeps its published path.

    ``model`` is transformers' decoder (``model.layers``, ``model.norm``, ``model.rotary_emb``); ``lm_head`` is ours.
    ``recompute_layers``: keep only the input of each layer for backward, in ``offload`` if there is one.
    ``streamer``: has the weights of the layers that only visit the device; those are always computed again.
    """

    def __init__(self, model: nn.Module, spec: ModelSpec, config: Any):
        super().__init__()
        self.model, self.spec, self.config = model, spec, config
        self.lm_head: nn.Module = FrozenLinear(spec.head)
        self.recompute_layers = False
        self.offload: Offload | None = None
        self.streamer: Streamer | None = None

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, in order."""
        layers = self.model.layers
        assert isinstance(layers, nn.ModuleList)
        return layers

    @property
    def device(self) -> torch.device:
        """Where the layers compute."""
        return self.model.norm.weight.device  # type: ignore[union-attr, return-value]

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, segments: Sequence[int] | None = None, cache: Any = None
    ) -> Tensor:
        """Final hidden states, after the last norm, of the fields of ``Rows``: [N, H], or [B, T, H]."""
        return self.finish(self.through([Rows(input_ids, position_ids, segments, cache)])[0])

    def through(self, batches: Sequence[Rows], turn: Callable[[int], None] = lambda number: None) -> list[Tensor]:
        """What the last layer makes of each of ``batches``, [N, H] or [B, T, H]. All of them pass a layer before the
        next layer is needed, so that a streamed layer is copied once for all.

        Embedding and layers take the batches from the last to the first: their backward pass comes in the reverse
        order, and so adds to gradients in the order of a pass for each batch. ``turn`` is told the number of a batch
        before each layer computes with it, in both passes.
        """
        xs, kwargs = [], []
        for rows in reversed(batches):
            flat = rows.input_ids.dim() == 1
            ids, positions = (t[None] if flat else t for t in (rows.input_ids, rows.position_ids))
            xs.append(self.model.embed_tokens(ids))  # type: ignore[operator]
            rope = self.model.rotary_emb(xs[-1], positions.to(xs[-1].device))  # type: ignore[operator]
            kwargs.append({"position_embeddings": rope, "past_key_values": rows.cache, "segments": rows.segments})
        xs.reverse()
        kwargs.reverse()
        if self.offload:
            self.offload.reset()
        if self.streamer:
            self.streamer.begin_pass(len(batches), self._back_to(xs))
        for index in range(len(self.layers)):
            for number in reversed(range(len(batches))):
                xs[number] = self._run(index, xs[number], kwargs[number], partial(turn, number))
        return [x[0] if rows.input_ids.dim() == 1 else x for x, rows in zip(xs, batches, strict=True)]

    def attach_streamer(self, streamer: Streamer) -> None:
        """Have ``streamer`` bring its layers; its slots count as buffers of the model."""
        self.streamer = streamer
        for number, slot in enumerate(streamer.slots):
            self.register_buffer(f"slot_{number}", slot, persistent=False)

    def finish(self, x: Tensor) -> Tensor:
        """The last norm."""
        return self.model.norm(x)  # type: ignore[operator]

    def logits(self, hidden: Tensor) -> Tensor:
        """Output projection: [..., H] to [..., V]."""
        return self.lm_head(hidden)

    def _run(self, index: int, x: Tensor, kwargs: dict[str, Any], before: Callable[[], None]) -> Tensor:
        layer, streamer = self.layers[index], self.streamer
        streamed = streamer is not None and index in streamer

        def compute(h: Tensor) -> Tensor:
            before()
            return layer(h, attention_mask=None, **kwargs)

        def hold() -> AbstractContextManager[None]:
            return streamer.hold(index) if streamer is not None and streamed else nullcontext()

        parameters = trainable(layer) if torch.is_grad_enabled() else []
        needed = torch.is_grad_enabled() and (x.requires_grad or bool(parameters))  # below it no backward pass comes
        if needed and (streamed or self.recompute_layers):
            last: FrozenLinear = layer.mlp.last  # type: ignore[union-attr, assignment]
            return recompute(compute, x, parameters, last, self.offload, hold)
        with hold():
            return compute(x)

    def _back_to(self, xs: Sequence[Tensor]) -> int | None:
        """The first layer that a backward pass would come to."""
        if not torch.is_grad_enabled():
            return None
        if any(x.requires_grad for x in xs):
            return 0
        trained = (i for i, layer in enumerate(self.layers) if any(p.requires_grad for p in layer.parameters()))
        return next(trained, None)

    def set_shifted_group(self, group: int | None) -> None:
        """In training let tokens attend within groups of ``group`` tokens, half of the heads within shifted ones."""
        for layer in self.layers:
            layer.self_attn.shifted_group = group  # type: ignore[union-attr]

    def set_recompute(self, what: str) -> None:
        """Keep for the backward pass all activations (``none``), those outside the MLPs (``mlp``), or the layers'
        inputs alone (``layer``), and compute the rest again.
        """
        self.recompute_layers = what == "layer"
        for index, layer in enumerate(self.layers):
            streamed = self.streamer is not None and index in self.streamer
            layer.mlp.recomputed = what == "mlp" and not streamed  # type: ignore[union-attr]

    def set_tile(self, tile: int | None) -> None:
        """Take ``tile`` tokens at a time through what computes each by itself: norms and MLPs; None for all."""
        norms: list[Any] = [self.model.norm, *(layer.input_layernorm for layer in self.layers)]
        for norm in norms:
            norm.tile = tile
        for layer in self.layers:
            layer.mlp.set_tile(tile, layer.post_attention_layernorm)  # type: ignore[union-attr, operator]


def build(spec: ModelSpec, config: Mapping[str, Any], name: str) -> Decoder:
    """The empty model of a ``config.json``: every linear a ``FrozenLinear`` without weight, the rest on meta.

    Raises:
        InputError: transformers cannot build this configuration.
    """
    import transformers

    attention.register()
    try:
        hf_config = transformers.AutoConfig.for_model(**config)
        hf_config._attn_implementation = attention.NAME
        hf_config.use_cache = False
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(hf_config).model
    except Exception as error:  # transformers raises all kinds for a config it does not like
        raise InputError(
            f"The model {name} cannot be built from its config.json: {error}",
            "It was changed by hand, or is of a newer transformers.",
            "Get config.json again, or update transformers.",
        ) from error
    decoder = Decoder(model, spec, hf_config)
    scale = getattr(model.embed_tokens, "scalar_embed_scale", 1.0)
    model.embed_tokens = Embedding(scale)
    for layer, layer_spec in zip(decoder.layers, spec.layers, strict=True):
        for linear in layer_spec.linears:
            _replace(layer, linear)
        layer.mlp = GatedMLP(layer.mlp, hf_config.hidden_act)  # type: ignore[arg-type]
        layer.self_attn = SelfAttention(layer.self_attn)
    replace_norms(model)
    decoder.requires_grad_(False)
    return decoder.train()


def _replace(layer: nn.Module, linear: LinearSpec) -> None:
    stock = layer.get_submodule(linear.name)
    # A pruned layer is narrower than what transformers builds; attention counts heads by the linears' sizes.
    assert isinstance(stock, nn.Linear) and all(
        side == whole or (axis in PRUNABLE and side < whole)
        for side, whole, axis in (
            (linear.out_features, stock.out_features, linear.out_axis),
            (linear.in_features, stock.in_features, linear.in_axis),
        )
    ), f"{linear.name}: the spec says {linear.out_features}x{linear.in_features}, transformers builds {stock}"
    layer.set_submodule(linear.name, FrozenLinear(linear))
