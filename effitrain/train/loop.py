"""The training loop: one function, ``train``, handed its parts by ``training.py``."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from effitrain.adapters.base import Clock
from effitrain.core.errors import InputError
from effitrain.data.batches import Batches, MicroBatch
from effitrain.model.decoder import Decoder
from effitrain.train.hooks import Hook, StepRecord
from effitrain.train.loss import backward_in_groups
from effitrain.train.optim import gradients, scale, set_lr
from effitrain.train.schedule import learning_rate
from effitrain.train.state import TrainState

_NOT_FINITE = (
    "The learning rate is too high, the weights are damaged, or fp16 overflowed.",
    "Nothing saved is lost. Try a tenth of --lr, or --dtype bf16 or fp32.",
)


@dataclass(frozen=True)
class Course:
    """Length and pace of a run.

    Attributes:
        steps: optimizer steps in all.
        micro_batches: micro-batches in all; the last step may have fewer than ``grad_accum``.
        grad_accum: micro-batches of a step.
        lr: peak learning rate.
        schedule: see ``learning_rate``.
        warmup: share of the run.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them alone.
        at_once: micro-batches of a step that pass a layer before the next one is needed.
    """

    steps: int
    micro_batches: int
    grad_accum: int
    lr: float
    schedule: str = "cosine"
    warmup: float = 0.03
    max_grad_norm: float = 1.0
    at_once: int = 1


def train(
    decoder: Decoder,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    course: Course,
    state: TrainState,
    clock: Clock,
    hooks: Sequence[Hook] = (),
    peak_bytes: Callable[[], int] = lambda: 0,
) -> None:
    """Train from ``state.step`` to ``course.steps``; ``decoder``, ``optimizer`` and ``state`` change in place.

    The loss of a step is the sum over its trained tokens divided by their number, however they are cut into
    micro-batches. Batches, rates and random choices depend on the step alone, so a resumed run repeats the run.

    Raises:
        InputError: a loss or a gradient is not finite; names the step and the micro-batch.
        Interrupted: from a hook, after saving.
    """
    decoder.train()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    while state.step < course.steps:
        started = time.perf_counter()
        _each(hooks, lambda hook: hook.before_step(state))
        lr = learning_rate(state.step, course.steps, course.lr, course.schedule, course.warmup)
        set_lr(optimizer, lr)
        first = state.step * course.grad_accum
        micro = [batches.get(i) for i in range(first, min(first + course.grad_accum, course.micro_batches))]
        clock.step = state.step
        loss = accumulate(decoder, micro, clock, parameters, course.at_once)
        norm = clip(parameters, course.max_grad_norm, state.step)
        _each(hooks, lambda hook: hook.after_backward(state))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        tokens = sum(len(batch.input_ids) for batch in micro)
        seconds = time.perf_counter() - started
        state.step += 1
        state.tokens += tokens
        state.seconds += seconds
        state.last_loss = loss
        state.first_loss = loss if state.first_loss is None else state.first_loss
        record = StepRecord(state.step, loss, lr, norm, tokens, tokens / seconds, peak_bytes())
        _each(hooks, lambda hook: hook.after_step(state, record))  # noqa: B023  (called at once)


def accumulate(
    decoder: Decoder,
    micro: Sequence[MicroBatch],
    clock: Clock,
    parameters: Sequence[Tensor] = (),
    at_once: int = 1,
) -> float:
    """Forward and backward over the micro-batches of one step, ``at_once`` of which pass a layer together; the mean
    loss of their trained tokens.

    Backward runs on sums and the float32 gradients of ``parameters`` are divided at the end: a mean over thousands of
    tokens would push half-precision activations' gradients below what fp16 can hold.

    Raises:
        InputError: a loss is not finite; names step and micro-batch.
    """
    trained = max(1, sum(batch.trained_tokens for batch in micro))
    losses = backward_in_groups(decoder, micro, clock.at_micro_batch, at_once)
    values = torch.stack(losses).tolist()  # read once a step: every reading waits for the device
    for number, value in enumerate(values, 1):
        if not math.isfinite(value):
            raise InputError(
                f"The loss of step {clock.step + 1}, micro-batch {number} of {len(micro)}, is {value}.", *_NOT_FINITE
            )
    scale(gradients(parameters), 1 / trained)
    return sum(values) / trained


def clip(parameters: Iterable[Tensor], max_norm: float, step: int) -> float:
    """Scale gradients down to ``max_norm`` (0: leave them) and return their norm before.

    Raises:
        InputError: a gradient is not finite.
    """
    grads = gradients(parameters)
    norm = nn.utils.get_total_norm(grads)
    if max_norm:
        scale(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    value = norm.item()  # waits for the device, once
    if not math.isfinite(value):
        raise InputError(f"The gradient of step {step + 1} is not finite.", *_NOT_FINITE)
    return value


def _each(hooks: Sequence[Hook], call: Callable[[Hook], None]) -> None:
    for hook in hooks:
        call(hook)
