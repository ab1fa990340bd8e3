"""What the terminal shows of a run, from the plan to the last step."""

import sys
from time import monotonic

from rich.console import Console as Terminal
from rich.text import Text
from tqdm import tqdm

from effitrain.api import Events
from effitrain.cli.plan_table import print_plan
from effitrain.cli.wrap import wrapped
from effitrain.core.plan import Plan
from effitrain.core.units import counted, format_bytes, format_duration
from effitrain.data.prepare import PreparedData
from effitrain.evals.perplexity import Evaluation
from effitrain.train.hooks import StepRecord

LOGGED_LINES = 10  # of training, where no terminal shows a bar
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"  # fits 80 columns


class Console(Events):
    """Prints what ``api.run`` tells, with a bar for loading and one for training; in a log, a line every tenth."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.began, self.done_before = 0.0, 0  # of training: seconds of the clock, and steps
        self.width = Terminal().width

    def note(self, text: str) -> None:
        """Lines of their own, at once, in the width of the terminal; a running bar stays below."""
        self._write(wrapped(text, self.width))

    def _write(self, text: str) -> None:
        tqdm.write(text)
        sys.stdout.flush()

    def planned(self, plan: Plan) -> None:
        """The plan's table."""
        print_plan(plan)

    def loaded(self, part: str, layers: int) -> None:
        """One more layer in place."""
        if self.bar is None:
            self.bar = _bar("loading", layers, leave=False)
        self.bar.update()
        if self.bar.n == layers:
            self.close()

    def stored(self, done: int, parts: int) -> None:
        """One more part of the store."""
        if self.bar is None:
            self.bar = _bar("building the store", parts, leave=False)
        if self.bar.disable and done * LOGGED_LINES // parts > (done - 1) * LOGGED_LINES // parts:
            self.note(f"Building the store: part {done} of {parts}")
        self.bar.update(done - self.bar.n)
        if done == parts:
            self.close()

    def data(self, data: PreparedData) -> None:
        """Counts, and one sample with its trained part marked."""
        stats = data.stats
        samples, evaluated = counted(stats.samples, "sample"), counted(len(data.eval), "sample")
        self.note(
            f"Data: {samples} ({stats.format}, template {stats.template}), {stats.tokens:,} tokens.\n"
            f"{stats.trained_share:.0%} trained; {stats.truncated:,} truncated, {stats.dropped:,} dropped; {evaluated}"
            " for evaluation.\n"
            "One sample, its trained part marked:"
        )
        lines = Text(data.preview).wrap(Terminal(), self.width)  # by the cells that characters take
        self._write("\n".join(line.plain.rstrip() for line in lines))

    def evaluated(self, when: str, evaluation: Evaluation) -> None:
        """A loss on the evaluation set."""
        self.note(f"Evaluation loss {when}: {evaluation.loss:.4f} (perplexity {evaluation.perplexity:.2f})")

    def training(self, done: int, steps: int) -> None:
        """Open the bar."""
        self.began, self.done_before = monotonic(), done
        self.bar = _bar("training", steps, done)

    def step(self, record: StepRecord) -> None:
        """Loss, speed and memory, beside the bar or in a line."""
        if self.bar is None:
            return
        speed, memory = f"{record.tokens_per_second:,.0f} tok/s", format_bytes(record.device_peak_bytes)
        told, steps = f"loss {record.loss:.3f}, {speed}, {memory}", self.bar.total
        if self.bar.disable and record.step * LOGGED_LINES // steps > (record.step - 1) * LOGGED_LINES // steps:
            self.note(f"Step {record.step} of {steps}: {told}{self._left(record.step, steps)}")
        self.bar.set_postfix_str(told)
        self.bar.update()
        if record.step == steps:
            self.close()

    def _left(self, step: int, steps: int) -> str:
        """The time that the steps to come take at the pace of those since the beginning."""
        pace = (monotonic() - self.began) / (step - self.done_before)
        return f", {format_duration(pace * (steps - step))} left" if step < steps else ""

    def close(self) -> None:
        """End an open bar, so that what is printed next begins a line."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def _bar(what: str, total: int, done: int = 0, leave: bool = True) -> tqdm:
    """A progress bar, which shows nothing where stderr is no terminal."""
    return tqdm(desc=what, total=total, initial=done, leave=leave, bar_format=_BAR, disable=None)


class KeepsPlan(Events):
    """Prints nothing and keeps the plan, for ``--json``."""

    def __init__(self) -> None:
        self.plan: Plan | None = None

    def planned(self, plan: Plan) -> None:
        """Keep it."""
        self.plan = plan
