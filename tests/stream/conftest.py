"""Models whose layers are resident or streamed, micro-batches for them, and their losses and gradients."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from samples import random_samples
from torch import Tensor

from effitrain.adapters.attach import attach
from effitrain.adapters.base import AdapterConfig, Clock
from effitrain.core.placement import Placement
from effitrain.data.batches import Batches, MicroBatch
from effitrain.model.decoder import Decoder, build
from effitrain.model.load import fill, find_base, stream
from effitrain.quant.read import DTYPES
from effitrain.stream.fresh import FreshLayers
from effitrain.train.loop import accumulate

CPU = torch.device("cpu")


@dataclass
class Trial:
    """A model with adapters whose B is not zero, ready to step."""

    decoder: Decoder
    clock: Clock
    parameters: list[Tensor] = field(default_factory=list)

    def step(self, micro: list[MicroBatch], at_once: int = 1) -> list[Tensor]:
        """The loss, and the gradient of every adapter tensor."""
        for parameter in self.parameters:
            parameter.grad = None
        loss = accumulate(self.decoder, micro, self.clock, self.parameters, at_once)
        return [torch.tensor(loss), *(p.grad for p in self.parameters if p.grad is not None)]


def make_trial(
    folder: Path,
    placement: Placement | None = None,
    quant: str = "nf4",
    dtype: str = "fp32",
    source=None,
    bytes_per_second: float | None = None,
    device: torch.device = CPU,
    **adapter,
) -> Trial:
    """The model in ``folder``: with ``placement`` streamed, without it resident and recomputed layer by layer."""
    base = find_base(str(folder))
    decoder = build(base.spec, base.source.config, "trial")
    streamed = placement.streamed if placement else ()
    fill(decoder, base.weights(), quant, DTYPES[dtype], device, streamed=streamed)
    if placement:
        stream(
            decoder,
            source or FreshLayers(base.spec, base.weights(), quant, dtype, device),
            placement,
            device,
            bytes_per_second=bytes_per_second,
        )
    decoder.set_recompute("layer")
    clock = Clock(seed=3, step=2)
    attach(decoder, AdapterConfig(r=4, **adapter), clock)
    parameters = [p for p in decoder.parameters() if p.requires_grad]
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in parameters:
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator).to(device)
    return Trial(decoder, clock, parameters)


@pytest.fixture(scope="session")
def trial() -> Callable[..., Trial]:
    """``trial(folder, placement, quant, dtype, source, bytes_per_second, device, **adapter)``."""
    return make_trial


@pytest.fixture(scope="session")
def micro_batches() -> Callable[..., list[MicroBatch]]:
    """``micro_batches(count, vocab, rows, longest)``: random samples, the first third of each masked."""

    def make(count: int = 3, vocab: int = 200, rows: int = 2, longest: int = 30) -> list[MicroBatch]:
        batches = Batches(random_samples(count * rows, longest - 1, vocab, count), rows, longest, False, 0)
        return [batches.get(i) for i in range(count)]

    return make


@pytest.fixture
def sleepy() -> Callable[[Trial, int], Trial]:
    """``sleepy(trial, seed)``: random sleeps while a layer is copied and while it is used."""

    def slow_down(trial: Trial, seed: int, most: float = 0.002) -> Trial:
        mover, rng = trial.decoder.streamer.engine.mover, np.random.default_rng(seed)
        for name in ("move", "acquire", "release"):
            call = getattr(mover, name)

            def delayed(*args, call=call, name=name):
                time.sleep(rng.random() * most * (1 if name == "move" else 0.5))
                return call(*args)

            setattr(mover, name, delayed)
        return trial

    return slow_down
