"""A trial before training on the largest batches there are: what a step and an evaluation really take."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch

from effitrain.adapters.base import Clock
from effitrain.core.errors import BudgetError
from effitrain.core.plan import Plan
from effitrain.core.units import format_bytes
from effitrain.data.batches import MicroBatch
from effitrain.model.decoder import Decoder
from effitrain.train.loop import accumulate, clip
from effitrain.train.loss import loss_sum
from effitrain.train.memory import Meter, model_tensors, optimizer_tensors
from effitrain.train.optim import set_lr
from effitrain.train.rows import blank_gradient


class OverBudget(BudgetError):
    """A trial took more than the budget; ``measured_bytes`` is how much, None where the allocator refused more."""

    def __init__(self, plan: Plan, measured_bytes: int | None):
        self.measured_bytes = plan.budget_bytes * 11 // 10 if measured_bytes is None else measured_bytes
        took = "asked for more" if measured_bytes is None else f"took {format_bytes(measured_bytes)}"
        super().__init__(
            f"A step {took}, and the budget is {format_bytes(plan.budget_bytes)}.",
            f"The plan expected {format_bytes(plan.peak_bytes)}.",
            "Try a smaller --batch-size or --max-seq-len, or --recompute layer.",
            plan=plan,
        )


def probe(
    decoder: Decoder,
    micro: Sequence[MicroBatch],
    optimizer: torch.optim.Optimizer,
    clock: Clock,
    meter: Meter,
    at_once: int = 1,
    evaluated: MicroBatch | None = None,
) -> None:
    """Run a whole step at a learning rate of zero, and an evaluation, and forget both: weights and states end as they
    were.

    The optimizer's states are made first, so that they are alive while activations peak, as in every later step.

    Args:
        decoder: with adapters.
        micro: the micro-batches of the step.
        optimizer: of the adapters.
        clock: of their random choices.
        meter: told of everything that the device holds.
        at_once: how many of them pass a layer before the next layer is needed.
        evaluated: the micro-batch of an evaluation.

    Raises:
        InputError: the loss or a gradient is not finite.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    set_lr(optimizer, 0.0)
    for parameter in parameters:
        parameter.grad = blank_gradient(parameter)
    optimizer.step()
    for parameter in parameters:  # a step takes the gradient of a table away, and earlier micro-batches leave one
        parameter.grad = blank_gradient(parameter) if parameter.grad is None else parameter.grad
    on_cpu = meter.device.type == "cpu"
    if on_cpu:
        _count(decoder, optimizer, meter)
    with meter.tracker if on_cpu else nullcontext():
        accumulate(decoder, micro, clock, parameters, at_once)
        clip(parameters, 0.0, clock.step)  # a rate of zero times infinity would be no zero
        optimizer.step()
        if evaluated is not None:
            with torch.no_grad():
                loss_sum(decoder, evaluated)
    optimizer.zero_grad(set_to_none=True)
    optimizer.state.clear()
    if hasattr(optimizer, "page_mng"):  # bitsandbytes keeps a second reference to paged states
        optimizer.page_mng.paged_tensors.clear()


def _count(decoder: Decoder, optimizer: torch.optim.Optimizer, meter: Meter) -> None:
    """On a CPU, say what was there before the step, and what of it counts as the host's."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    held = [*model_tensors(decoder), *optimizer_tensors(optimizer), *(p.grad for p in parameters)]
    if decoder.offload:
        meter.tracker.ignore(decoder.offload.host)
        held.append(decoder.offload.staging)
    meter.tracker.add(tensor for tensor in held if tensor is not None)
