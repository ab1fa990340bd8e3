"""FLAP's compensation (An et al. 2024): what dropped channels gave on average becomes a bias.

The outputs of ``o_proj`` and ``down_proj`` of a pruned layer lose ``W_dropped x_dropped``; its mean over calibration
text, by the full model, is added to them. The full model has no such bias, and a recovered adapter needs none: there
the channels themselves are back.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from effitrain.core.cut import read_pruned
from effitrain.core.keep import KeepMap
from effitrain.core.paths import path_of
from effitrain.core.spec import LinearSpec
from effitrain.data.batches import MicroBatch
from effitrain.model.walk import Walk, frozen
from effitrain.pruning.align import Fit, states_of


class Biases:
    """The mean losses by path, as an edit of cut weights.

    Args:
        full: through the full-size model.
        keep: what is kept.
        batches: calibration text.
        progress: told every fit: the error if all else were the full model's.
    """

    def __init__(
        self,
        full: Walk,
        keep: KeepMap,
        batches: Sequence[MicroBatch],
        progress: Callable[[Fit], None] = lambda fit: None,
    ):
        self.full, self.keep, self.progress = full, keep, progress
        self.paths = read_pruned(full.decoder.spec, keep.widths)
        self.fits: list[Fit] = []
        self.means: Mapping[str, Tensor] = self._measure(batches)

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """The bias ``name`` with what is lost added, in its dtype; any other tensor as it is."""
        mean = self.means.get(name.removesuffix(".bias"))
        return tensor if mean is None or not name.endswith(".bias") else (tensor + mean).to(tensor.dtype)

    @torch.no_grad()
    def _measure(self, batches: Sequence[MicroBatch]) -> dict[str, Tensor]:
        found, passing = {}, self.full.start(batches)
        for index, spec in enumerate(self.full.decoder.spec.layers):
            with self.full.layer(index) as layer:
                lost = {
                    path: _Lost(layer, linear, self.keep.indices(index, linear.in_axis) or [])
                    for linear in spec.linears
                    if (path := path_of(index, linear.name)) in self.paths
                }
                for one in passing:
                    states = states_of(self.full, layer, one)
                    one.x = states["mlp"]
                    for part in lost.values():
                        part.size += states[part.block].double().square().sum().item()
                for path, part in lost.items():
                    found[path] = part.mean()
                    self.fits.append(part.fit(index))
                    self.progress(self.fits[-1])
        return found


class _Lost:
    """What one linear of the full model, while it computes, gets from the inputs that are dropped."""

    def __init__(self, layer: nn.Module, linear: LinearSpec, kept: Sequence[int]):
        self.name, self.block = linear.name, linear.name.partition(".")[0]
        module = layer.get_submodule(linear.name)
        weight = frozen(module).dense(torch.float32)
        dropped = torch.ones(linear.in_features, dtype=torch.bool, device=weight.device)
        dropped[torch.tensor(kept, device=weight.device)] = False
        self.columns = dropped.nonzero().flatten()
        self.weight = weight[:, self.columns]
        self.sum = torch.zeros(linear.out_features, dtype=torch.float64, device=weight.device)
        self.tokens, self.squares, self.size = 0, 0.0, 0.0
        self.handle = module.register_forward_hook(self._see)

    def mean(self) -> Tensor:
        """[out] on the host; nothing is watched afterwards."""
        self.handle.remove()
        return (self.sum / max(1, self.tokens)).float().cpu()

    def fit(self, layer: int) -> Fit:
        """The error without and with the bias."""
        size = self.size or 1.0
        gained = self.tokens * (self.sum / max(1, self.tokens)).square().sum().item()
        return Fit(layer, self.name, self.squares / size, (self.squares - gained) / size)

    def _see(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        given = inputs[0][0][:, self.columns].float() @ self.weight.t()
        self.sum += given.sum(0, dtype=torch.float64)
        self.squares += given.double().square().sum().item()
        self.tokens += len(given)
