"""What the terminal shows of a run, from the plan to the last step."""

from tqdm import tqdm

from effitrain.api import Events
from effitrain.cli.plan_table import print_plan
from effitrain.core.plan import Plan
from effitrain.core.units import format_bytes
from effitrain.data.prepare import PreparedData
from effitrain.evals.perplexity import Evaluation
from effitrain.train.hooks import StepRecord


class Console(Events):
    """Prints what ``api.run`` tells, with a bar for loading and one for training."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def note(self, text: str) -> None:
        """A line of its own; a running bar stays below it."""
        tqdm.write(text)

    def planned(self, plan: Plan) -> None:
        """The plan's table."""
        print_plan(plan)

    def loaded(self, part: str, layers: int) -> None:
        """One more layer in place."""
        if self.bar is None:
            self.bar = tqdm(total=layers, desc="loading", unit="layer", leave=False)
        self.bar.update()
        if self.bar.n == layers:
            self.close()

    def stored(self, done: int, parts: int) -> None:
        """One more part of the store."""
        if self.bar is None:
            self.bar = tqdm(total=parts, desc="building the store", unit="part", leave=False)
        self.bar.update(done - self.bar.n)
        if done == parts:
            self.close()

    def data(self, data: PreparedData) -> None:
        """Counts, and one sample with its trained part marked."""
        stats = data.stats
        self.note(
            f"Data: {stats.samples} samples ({stats.format}, template {stats.template}), {stats.tokens} tokens,"
            f" {stats.trained_share:.0%} trained; {stats.truncated} truncated, {stats.dropped} dropped;"
            f" {len(data.eval)} samples for evaluation. One sample, its trained part marked:"
        )
        self.note(data.preview)

    def evaluated(self, when: str, evaluation: Evaluation) -> None:
        """A loss on the evaluation set."""
        self.note(f"Evaluation loss {when}: {evaluation.loss:.4f} (perplexity {evaluation.perplexity:.2f})")

    def training(self, done: int, steps: int) -> None:
        """Open the bar."""
        self.bar = tqdm(total=steps, initial=done, desc="training", unit="step")

    def step(self, record: StepRecord) -> None:
        """Loss, speed and memory beside the bar."""
        if self.bar is None:
            return
        self.bar.set_postfix_str(
            f"loss {record.loss:.3f}, {record.tokens_per_second:,.0f} tok/s, {format_bytes(record.device_peak_bytes)}"
        )
        self.bar.update()
        if self.bar.n == self.bar.total:
            self.close()

    def close(self) -> None:
        """End an open bar, so that what is printed next begins a line."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class KeepsPlan(Events):
    """Prints nothing and keeps the plan, for ``--json``."""

    def __init__(self) -> None:
        self.plan: Plan | None = None

    def planned(self, plan: Plan) -> None:
        """Keep it."""
        self.plan = plan
