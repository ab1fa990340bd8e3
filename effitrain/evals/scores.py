"""The losses of a run on its evaluation set."""

from collections.abc import Callable
from dataclasses import astuple

from effitrain.data.batches import Batches
from effitrain.evals.perplexity import Evaluation
from effitrain.evals.positions import Bucket, ByPosition, beyond_its_length, default_bucket, longest_sample, score
from effitrain.evals.samples import Samples
from effitrain.io.run_folder import RunFolder
from effitrain.model.decoder import Decoder
from effitrain.train.state import TrainState


class Scores:
    """Losses on the evaluation set by step, noted in the run folder so that a resumed run keeps them.

    Where samples are longer than a bucket of positions, also the losses by position, first and last. With ``samples``
    also what the model answers, first and last.
    """

    def __init__(
        self,
        decoder: Decoder,
        batches: Batches,
        folder: RunFolder,
        state: TrainState,
        tell: Callable[[str, Evaluation], None],
        at_once: int = 1,
        samples: Samples | None = None,
    ):
        self.decoder, self.batches, self.folder, self.state, self.tell = decoder, batches, folder, state, tell
        self.at_once = at_once  # micro-batches that pass a layer together
        self.samples = samples
        self.answers: list[list[str]] = folder.notes.get("answers", [])
        self.points = [(step, loss) for step, loss in folder.notes.get("evals", []) if step <= state.step]
        noted = folder.notes.get("positions", [])
        self.positions = [(step, tuple(Bucket(*b) for b in buckets)) for step, buckets in noted if step <= state.step]
        self.longest, self.made_for = longest_sample(batches), decoder.spec.max_positions

    def add(self, when: str) -> None:
        """Evaluate now; does nothing when there is no evaluation set."""
        if not self.batches.per_epoch:
            return
        apart = self.longest > default_bucket(self.longest, self.made_for)
        found = score(self.decoder, self.batches, self.at_once, "auto" if apart else None)
        if found.buckets:
            self.positions = [*self.positions[:1], (self.state.step, found.buckets)]
        self.points.append((self.state.step, found.evaluation.loss))
        if self.samples and when in ("before", "after"):
            first = self.answers[:1] if when == "after" else []
            self.answers = [*first, self.samples.answers()]
        noted = [(step, [astuple(bucket) for bucket in buckets]) for step, buckets in self.positions]
        self.folder = self.folder.note(evals=self.points, positions=noted, answers=self.answers)
        self.tell(when, found.evaluation)

    def read(self) -> list[dict[str, str]] | None:
        """The samples with the answers before and after training; None where there are none."""
        return self.samples.rows(*self.answers) if self.samples and len(self.answers) == 2 else None

    def by_position(self) -> ByPosition | None:
        """The first and the last evaluation by position; None where there is none."""
        if len(self.positions) < 2:
            return None
        first, last = self.positions[0][1], self.positions[-1][1]
        return ByPosition(first, last, beyond_its_length(last, self.longest, self.made_for))
