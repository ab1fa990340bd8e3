"""Alignment on one card: least squares on what reads the pruned channels, layer by layer.

LoRAM aligns a pruned model by continued pre-training of all weights on eight cards. Here ``o_proj`` and ``down_proj``
of pruned layers are solved for in closed form, so that on calibration text the small model's hidden states follow the
full model's: min over W of ||W a - t||^2 + ridge ||W - W_cut||^2, with a the small model's inputs of that linear and t
what the full model has at that place. Both models pass layer by layer, so one layer of each is in memory.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from effitrain.core.keep import KeepMap
from effitrain.core.paths import layer_of, path_of
from effitrain.core.spec import Axis, LinearSpec
from effitrain.data.batches import MicroBatch
from effitrain.model.walk import Passing, Walk, frozen

# As a share of the inputs' mean square. On a 3M-parameter model, share of the gain that arrived in 60 steps: at ratio
# 0.5, 0.906 with 0.01, 0.920 with 0.1, 0.921 with 1 (0.864 unaligned); at 0.75, 0.766, 0.786 and, with 0.3, 0.788.
RIDGE = 0.3


@dataclass(frozen=True)
class Fit:
    """How far hidden states behind a linear are from the full model's, as a share of their size, before and after."""

    layer: int
    linear: str
    before: float
    after: float


class Aligner:
    """Aligned weights, computed when they are asked for; layers must be asked for in order.

    Args:
        full: through the full-size model.
        small: through the cut one.
        keep: what was kept; only layers and parts that lost something are aligned.
        batches: calibration text.
        progress: told every fit.
    """

    def __init__(
        self,
        full: Walk,
        small: Walk,
        keep: KeepMap,
        batches: Sequence[MicroBatch],
        progress: Callable[[Fit], None] = lambda fit: None,
    ):
        self.full, self.small, self.keep, self.progress = full, small, keep, progress
        self.fits: list[Fit] = []
        self._solved: dict[str, Tensor] = {}
        self._layers = self._align(batches)
        self._next = 0

    def __call__(self, name: str, cut: Tensor) -> Tensor:
        """The aligned tensor ``name`` in the dtype of ``cut``; ``cut`` itself where there is nothing to align."""
        layer = layer_of(name)
        while layer is not None and self._next <= layer:
            self._solved = next(self._layers)
            self._next += 1
        return self._solved[name].to(cut.dtype) if name in self._solved else cut

    def _align(self, batches: Sequence[MicroBatch]) -> Iterator[dict[str, Tensor]]:
        """The aligned weights of one layer after the other, on the host."""
        with torch.no_grad():
            ahead, behind = self.full.start(batches), self.small.start(batches)
        for index, layer_spec in enumerate(self.small.decoder.spec.layers):
            with torch.no_grad(), self.full.layer(index) as layer:
                targets = [states_of(self.full, layer, one) for one in ahead]
            solved = {}
            with torch.no_grad(), self.small.layer(index) as layer:
                for linear in layer_spec.linears:
                    if linear.out_axis == Axis.MODEL and self.keep.indices(index, linear.in_axis) is not None:
                        weight = self._solve(index, layer, linear, behind, targets)
                        frozen(layer.get_submodule(linear.name)).weight = weight
                        solved[path_of(index, linear.name, "weight")] = weight.cpu()
                for one in behind:
                    one.x = self.small.run(layer, one).cpu()
            for one, target in zip(ahead, targets, strict=True):
                one.x = target[_MLP]
            yield solved

    def _solve(
        self, index: int, layer: nn.Module, linear: LinearSpec, behind: list[Passing], targets: list[dict[str, Tensor]]
    ) -> Tensor:
        module = frozen(layer.get_submodule(linear.name))
        problem = LeastSquares(linear.out_features, linear.in_features, self.small.device)
        place = linear.name.partition(".")[0]
        for one, target in zip(behind, targets, strict=True):
            inputs: list[Tensor] = []
            handle = layer.get_submodule(linear.name).register_forward_hook(_keep_input(inputs))
            states = states_of(self.small, layer, one)
            handle.remove()
            problem.add(inputs[0][0], (target[place] - states[place])[0], target[place][0])
        change, before, after = problem.solve(RIDGE)
        self.fits.append(Fit(index, linear.name, before, after))
        self.progress(self.fits[-1])
        weight = module.dense(torch.float32)
        return (weight + change).to(weight.dtype)


class LeastSquares:
    """min over D of sum ||D a - r||^2 + ridge ||D||^2, gathered from batches of inputs a and what is left to explain r.

    Args:
        outputs: length of r.
        inputs: length of a.
        device: where it is gathered, in float64.
    """

    def __init__(self, outputs: int, inputs: int, device: torch.device):
        self.gram = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.cross = torch.zeros(outputs, inputs, dtype=torch.float64, device=device)
        self.error = self.size = 0.0

    def add(self, a: Tensor, r: Tensor, target: Tensor) -> None:
        """Inputs [N, in], residuals [N, out] and, to measure them by, the targets [N, out]."""
        a, r = a.to(self.gram), r.to(self.gram)
        self.gram += a.t() @ a
        self.cross += r.t() @ a
        self.error += r.square().sum().item()
        self.size += target.double().square().sum().item()

    def solve(self, ridge: float) -> tuple[Tensor, float, float]:
        """D [out, in] in float32 and the relative squared error without and with it; ``ridge`` is a share of the mean
        of the inputs' squares.
        """
        damping = max(ridge * self.gram.diagonal().mean().item(), torch.finfo(torch.float64).tiny)
        self.gram.diagonal().add_(damping)  # at 14,336 inputs it takes 1.6 GB, so there is no second one
        solution = torch.cholesky_solve(self.cross.t(), torch.linalg.cholesky(self.gram)).t()
        self.gram.diagonal().sub_(damping)
        gained = (solution * self.cross).sum().item() + damping * solution.square().sum().item()
        size = self.size or 1.0
        return solution.float(), self.error / size, (self.error - gained) / size


_ATTENTION, _MLP = "self_attn", "mlp"


def states_of(walk: Walk, layer: nn.Module, one: Passing) -> dict[str, Tensor]:
    """Hidden states [1, N, H] behind a layer's attention and behind its MLP, on the host."""
    attended: list[Tensor] = []
    handle = layer.get_submodule("self_attn.o_proj").register_forward_hook(
        lambda module, inputs, output: attended.append(output)
    )
    out = walk.run(layer, one)
    handle.remove()
    return {_ATTENTION: one.x + attended[0].cpu(), _MLP: out.cpu()}


def _keep_input(kept: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    return lambda module, inputs, output: kept.append(inputs[0])
