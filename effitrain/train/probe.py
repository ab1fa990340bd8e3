"""One step on the longest micro-batch before training: what it really takes, and proof that it fits."""

from contextlib import nullcontext

import torch

from effitrain.adapters.base import Clock
from effitrain.data.batches import MicroBatch
from effitrain.model.decoder import Decoder
from effitrain.train.loop import accumulate
from effitrain.train.memory import Meter, model_tensors, optimizer_tensors
from effitrain.train.optim import set_lr


def probe(decoder: Decoder, batch: MicroBatch, optimizer: torch.optim.Optimizer, clock: Clock, meter: Meter) -> None:
    """Run a whole step on ``batch`` at a learning rate of zero and forget it: weights and states end as they were.

    The optimizer's states are made first, so that they are alive while activations peak, as in every later step.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    set_lr(optimizer, 0.0)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    on_cpu = meter.device.type == "cpu"
    if on_cpu:
        held = [*model_tensors(decoder), *optimizer_tensors(optimizer), *(p.grad for p in parameters)]
        meter.tracker.add(tensor for tensor in held if tensor is not None)
    with meter.tracker if on_cpu else nullcontext():
        accumulate(decoder, [batch], clock, parameters)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    optimizer.state.clear()
    if hasattr(optimizer, "page_mng"):  # bitsandbytes keeps a second reference to paged states
        optimizer.page_mng.paged_tensors.clear()
