"""What may happen at fixed moments of the loop. A hook is handed to the loop; the loop knows none by name."""

import json
import signal
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from effitrain.core.errors import InputError, Interrupted
from effitrain.io.atomic import write_text
from effitrain.train.state import TrainState, snapshot, write_checkpoint

# A checkpoint of up to this size is written beside training: a copy of it is small against what the ledger's line for
# the process has to spare, which data share.
BESIDE_BYTES = 2**27


@dataclass(frozen=True)
class StepRecord:
    """One line of metrics.jsonl. ``loss`` is the mean over the step's trained tokens, ``tokens`` counts all of them."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    tokens_per_second: float
    device_peak_bytes: int


class Hook:
    """Base of hooks: every moment does nothing."""

    def before_step(self, state: TrainState) -> None:
        """Before the first micro-batch of a step."""

    def after_backward(self, state: TrainState) -> None:
        """Gradients are complete and clipped; the optimizer has not stepped."""

    def after_step(self, state: TrainState, record: StepRecord) -> None:
        """The optimizer has stepped and ``state`` counts the step."""


class MetricsFile(Hook):
    """Appends each step to metrics.jsonl; on resume, lines of steps that will be done again are dropped."""

    def __init__(self, path: Path, done_steps: int):
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        steps = [_step_of(line) for line in lines]
        kept = [line for line, step in zip(lines, steps, strict=True) if step is not None and step <= done_steps]
        write_text(path, "".join(f"{line}\n" for line in kept))

    def after_step(self, state: TrainState, record: StepRecord) -> None:
        """Append and flush."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record)) + "\n")


class Checkpoints(Hook):
    """Saves every ``every`` steps and at the last one: a copy is taken, and written while training goes on. What is too
    large for a copy in host memory is written first, tensor by tensor.

    Used as a context, which ends when the last one is on the disk.
    """

    def __init__(
        self,
        folder: Path,
        trainable: Mapping[str, torch.Tensor],
        optimizer: torch.optim.Optimizer,
        every: int,
        keep: int,
        steps: int,
    ):
        self.folder, self.trainable, self.optimizer = folder, trainable, optimizer
        self.every, self.keep, self.steps = every, keep, steps
        self._writer = ThreadPoolExecutor(1, "effitrain checkpoints")
        self._writing: Future[Path] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._writer.shutdown()
        if kind is None:
            self.wait()

    def wait(self) -> Path | None:
        """The checkpoint that was being written, once it is on the disk; None where none was.

        Raises:
            InputError: it could not be written.
        """
        writing, self._writing = self._writing, None
        return writing.result() if writing else None

    def save(self, state: TrainState) -> None:
        """Save now, when the one before is written: never is more than one copy held."""
        self.wait()
        taken = snapshot(state, self.trainable, self.optimizer, BESIDE_BYTES)
        self._writing = self._writer.submit(write_checkpoint, self.folder, taken, self.keep)
        if not taken.own:
            wait([self._writing])

    def after_step(self, state: TrainState, record: StepRecord) -> None:
        """Save when it is time.

        Raises:
            InputError: the one before could not be written.
        """
        if self._writing is not None and self._writing.done():
            self.wait()
        if state.step % self.every == 0 or state.step == self.steps:
            self.save(state)


class StopOnSignal(Hook):
    """Ctrl-C and SIGTERM finish the step, save and stop; a second one waits for a checkpoint being written alone."""

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints, self.asked = checkpoints, False

    def __enter__(self) -> "StopOnSignal":
        try:
            self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread: the caller handles signals
            self._before = {}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def after_step(self, state: TrainState, record: StepRecord) -> None:
        """Save and stop when asked to.

        Raises:
            Interrupted: after saving.
        """
        if self.asked:
            self.checkpoints.save(state)
            saved = self.checkpoints.wait()
            raise Interrupted(
                f"Stopped after step {state.step}; saved {saved}.", next_step="The same command goes on from there."
            )


class Calls(Hook):
    """Calls functions of rooms that this one does not know."""

    def __init__(self, after_backward: Callable[[], None], after_step: Callable[[int], None]):
        self._after_backward, self._after_step = after_backward, after_step

    def after_backward(self, state: TrainState) -> None:
        """Call the first."""
        self._after_backward()

    def after_step(self, state: TrainState, record: StepRecord) -> None:
        """Call the second with the steps done."""
        self._after_step(state.step)


class EveryN(Hook):
    """Calls ``act(state)`` every ``n`` steps."""

    def __init__(self, n: int, act: Callable[[TrainState], None]):
        self.n, self.act = n, act

    def after_step(self, state: TrainState, record: StepRecord) -> None:
        """Act when it is time."""
        if state.step % self.n == 0:
            self.act(state)


def check_tracker(kind: str) -> None:
    """Make sure the tracker is installed.

    Raises:
        InputError: it is not; names the extra.
    """
    try:
        if kind != "none":
            import_module(kind)
    except ImportError:
        raise InputError(f"--report-to {kind}: not installed.", next_step='`pip install "effitrain[track]"`') from None


class Tracker(Hook):
    """Sends metrics to TensorBoard or Weights & Biases, the extra ``effitrain[track]``."""

    def __init__(self, kind: str, folder: Path):
        self._send = _tensorboard(folder) if kind == "tensorboard" else _wandb(folder)

    def after_step(self, state: TrainState, record: StepRecord) -> None:
        """Send the step's numbers."""
        self._send(asdict(record))


class Listener(Hook):
    """Calls ``tell(record)`` after every step: progress bars."""

    def __init__(self, tell: Callable[[StepRecord], None]):
        self.tell = tell

    def after_step(self, state: TrainState, record: StepRecord) -> None:
        """Tell."""
        self.tell(record)


def _step_of(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None  # the half line of a killed run


def _tensorboard(folder: Path) -> Callable[[dict[str, Any]], None]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def send(values: dict[str, Any]) -> None:
        step = values.pop("step")
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return send


def _wandb(folder: Path) -> Callable[[dict[str, Any]], None]:
    import wandb

    run = wandb.init(project="effitrain", dir=str(folder))
    return lambda values: run.log(values, step=values["step"])
