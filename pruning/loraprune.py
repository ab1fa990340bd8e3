"""LoRAPrune (Zhang et al. 2024): structured pruning while LoRA trains, guided by LoRA's own gradients.

A weight's importance is |G (W0 + s B A)|, with the gradient G of the whole weight estimated from those of the factors.
The paper's estimate is dB A + B dA = s (G A^T A + B B^T G). The first term mixes columns, the second rows, so for a
group that is a set of columns the first is noise of the other groups, as large as what is sought. Here a group counts
by the columns that read it, in down_proj or o_proj, what pruning takes from the sum, and G is B dA = s B B^T G, which
keeps columns apart. On stories3M after 24 steps the half of the FFN channels so chosen, without training, leaves a loss
of 3.01, the paper's choice 3.66, exact first-order Taylor 3.31 and Wanda 2.88.

The importance is brought to length 1 per linear and averaged over steps; masks on outputs grow by a cubic schedule;
what they hide at last is removed. Groups are FFN channels and KV heads with their query heads: the published code cuts
grouped heads in pieces.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from effitrain.adapters.base import Adapter, AdapterConfig
from effitrain.adapters.storage import AdapterBundle
from effitrain.core.errors import InputError
from effitrain.core.keep import KeepMap, LayerKeep
from effitrain.core.paths import path_of
from effitrain.core.spec import PRUNABLE, Axis, LayerSpec, ModelSpec, Widths
from effitrain.io.nf4 import NF4Tensor
from effitrain.model.decoder import Decoder
from effitrain.model.load import Base
from effitrain.model.walk import frozen
from effitrain.pruning.cut import CutWeights, Source, write_cut
from effitrain.pruning.groups import members, per_group
from effitrain.quant.nf4 import quantize

# Shares of the run between which groups go, in at most so many cuts, at most so many steps apart. Published are 0.1 and
# 0.9; but what is cut late has few steps, at a low rate, to recover. Perplexity of stories3M after 240 steps: 9.88 with
# 0.05 to 0.3, 9.78 with these. The order needs a B that is not zero, of any size, so it is known early.
_BEGIN, _END, _TIMES, _EVERY = 0.03, 0.12, 20, 10
_DECAY = 0.9


class LoRAPrune:
    """What the loop calls: scores after each backward pass, masks after each step.

    Args:
        decoder: with adapters on it; its outputs are masked from now on.
        adapters: by module path, LoRA with tensors A and B.
        widths: of the layers at the end.
        steps: length of the run.
    """

    def __init__(self, decoder: Decoder, adapters: Mapping[str, Adapter], widths: Sequence[Widths], steps: int):
        self.decoder, self.adapters, self.steps = decoder, adapters, steps
        self.every = min(_EVERY, max(1, int((_END - _BEGIN) * steps / _TIMES)))
        self.masks: dict[tuple[int, Axis], Tensor] = {}
        self.scores: dict[tuple[int, Axis], Tensor] = {}
        self.removed: dict[tuple[int, Axis], int] = {}
        for layer, whole, kept in zip(decoder.spec.layers, decoder.spec.widths, widths, strict=True):
            for part, before, after in (
                (Axis.FFN, whole.ffn, kept.ffn),
                (Axis.KV_HEADS, whole.kv_heads, kept.kv_heads),
            ):
                if after < before:
                    if not self._readers(layer, part):
                        raise InputError(
                            f"Nothing of layer {layer.index} that reads its {part} has an adapter to score them by.",
                            next_step="Leave --lora-targets out, or add down_proj and o_proj to it.",
                        )
                    key = layer.index, part
                    self.masks[key] = torch.ones(before, device=decoder.device)
                    self.scores[key] = torch.zeros(before, device=decoder.device)
                    self.removed[key] = before - after
                    self._mask_outputs(layer, part)

    def state(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint must hold to go on: they are read and written in place."""
        named = {"mask": self.masks, "score": self.scores}
        return {f"loraprune.{kind}.{i}.{part}": t for kind, ts in named.items() for (i, part), t in ts.items()}

    @torch.no_grad()
    def after_backward(self) -> None:
        """Take this step's gradients into the running scores; a step whose scores are not finite is left out."""
        for key, score in self.scores.items():
            now = self._importance(*key)
            if torch.isfinite(now).all():
                score.mul_(_DECAY).add_(now, alpha=1 - _DECAY)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Mask what the schedule asks for after ``step`` steps; at the last step exactly the final share."""
        if step != self.steps and step % self.every:
            return
        share = 1.0 if step == self.steps else removed_share(step / self.steps)
        for key, mask in self.masks.items():
            if not self.scores[key].any() and step != self.steps:
                continue  # B is zero in the first step
            count = int(self.removed[key] * share)  # few KV heads go, and late, when the scores know most
            order = torch.argsort(torch.where(mask > 0, self.scores[key], -1.0), stable=True)
            mask[order[:count]] = 0

    def keep_map(self, base: str, fingerprint: str) -> KeepMap:
        """What the masks leave."""
        spec = self.decoder.spec

        def kept(index: int, part: Axis, size: int) -> tuple[int, ...]:
            mask = self.masks.get((index, part))
            return tuple(range(size)) if mask is None else tuple(mask.nonzero().flatten().tolist())

        layers = [
            LayerKeep(kept(index, Axis.FFN, whole.ffn), kept(index, Axis.KV_HEADS, whole.kv_heads))
            for index, whole in enumerate(spec.widths)
        ]
        return KeepMap.of(spec, layers, base, fingerprint)

    def write(self, base: Base, config: AdapterConfig, target: Path, nf4: bool = False) -> None:
        """Remove what is masked, merge the adapters into what is left, and write it as a model folder.

        Args:
            base: the full-size model, with its files on disk.
            config: of the adapters.
            target: written complete or not at all; config.json, safetensors and keep.safetensors.
            nf4: in NF4, as transformers with bitsandbytes saves it, in place of the dtype of ``base``.
        """
        source: Source = base.weights()  # type: ignore[assignment]
        keep = self.keep_map(base.name, source.fingerprint())
        pairs = {path: adapter.factors() for path, adapter in self.adapters.items()}
        factors = {path: (left.cpu(), right.cpu()) for path, (left, right) in pairs.items()}
        edit = merged(AdapterBundle(config, base.name, factors), keep, base.spec)
        small = CutWeights(source, base.spec, keep, edit)

        def in_nf4(matrix: Tensor) -> NF4Tensor:
            return quantize(matrix.to(self.decoder.device))

        write_cut(target, small, base.source.config, base.source.folder, quantize=in_nf4 if nf4 else None)

    def columns(self, path: str, weight: Tensor) -> Tensor:
        """Importance of the columns of an adapted linear, float32 [in]; ``weight`` is its W0."""
        return column_importance(self.adapters[path], weight)

    def _importance(self, index: int, part: Axis) -> Tensor:
        total = torch.zeros_like(self.scores[index, part])
        for path in self._readers(self.decoder.spec.layers[index], part):
            weight = frozen(self.decoder.get_submodule(path)).dense(torch.float32)
            groups = per_group(self.columns(path, weight), len(total))
            total += groups / groups.norm().clamp_min(torch.finfo(torch.float32).tiny)
        return total

    def _readers(self, layer: LayerSpec, part: Axis) -> list[str]:
        """Paths of the linears with an adapter whose columns belong to ``part``."""
        paths = [path_of(layer.index, m.linear.name) for m in members(layer, part) if m.dim == 1]
        return [path for path in paths if path in self.adapters]

    def _mask_outputs(self, layer: LayerSpec, part: Axis) -> None:
        """Multiply the outputs of the linears whose rows belong to ``part`` by its mask; columns need none."""
        for member in members(layer, part):
            if member.dim == 0:
                module = self.decoder.layers[layer.index].get_submodule(member.linear.name)
                module.register_forward_hook(partial(_masked, self.masks[layer.index, part]))


def column_importance(adapter: Adapter, weight: Tensor) -> Tensor:
    """Sum over rows of |B dA (W0 + s B A)|, float32 [in], of a LoRA that has gradients; ``weight`` is W0 [out, in]."""
    A, B = adapter.get_parameter("A"), adapter.get_parameter("B")
    assert A.grad is not None
    return (B.float() @ A.grad.float()).mul_(weight + adapter.delta_weight()).abs_().sum(0)


def removed_share(done: float) -> float:
    """Share of what goes in the end that is gone when ``done`` of the steps are: cubic from 0 to 1."""
    progress = min(1.0, max(0.0, (done - _BEGIN) / (_END - _BEGIN)))
    return 1 - (1 - progress) ** 3


def merged(bundle: AdapterBundle, keep: KeepMap, spec: ModelSpec) -> Callable[[str, Tensor], Tensor]:
    """An edit of cut weights that adds the kept part of an adapter of the full-size model."""
    axes = {
        path_of(layer.index, linear.name): (layer.index, linear.out_axis, linear.in_axis)
        for layer in spec.layers
        for linear in layer.linears
    }

    def edit(name: str, tensor: Tensor) -> Tensor:
        path = name.removesuffix(".weight")
        if path not in bundle.tensors:
            return tensor
        B, A = bundle.tensors[path]
        index, out_axis, in_axis = axes[path]
        rows = keep.indices(index, out_axis) if out_axis in PRUNABLE else None
        columns = keep.indices(index, in_axis) if in_axis in PRUNABLE else None
        B = B if rows is None else B[rows]
        A = A if columns is None else A[:, columns]
        return tensor.float().addmm(B, A, alpha=bundle.config.scaling).to(tensor.dtype)

    return edit


def _masked(mask: Tensor, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    channels = mask.repeat_interleave(output.shape[-1] // len(mask))
    return output * channels.to(output.dtype)
