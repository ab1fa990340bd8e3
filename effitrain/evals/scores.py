"""The losses of a run on its evaluation set."""

from collections.abc import Callable

from effitrain.data.batches import Batches
from effitrain.evals.perplexity import Evaluation, evaluate_loss
from effitrain.io.run_folder import RunFolder
from effitrain.model.decoder import Decoder
from effitrain.train.state import TrainState


class Scores:
    """Losses on the evaluation set by step, noted in the run folder so that a resumed run keeps them."""

    def __init__(
        self,
        decoder: Decoder,
        batches: Batches,
        folder: RunFolder,
        state: TrainState,
        tell: Callable[[str, Evaluation], None],
    ):
        self.decoder, self.batches, self.folder, self.state, self.tell = decoder, batches, folder, state, tell
        self.points = [(step, loss) for step, loss in folder.notes.get("evals", []) if step <= state.step]

    def add(self, when: str) -> None:
        """Evaluate now; does nothing when there is no evaluation set."""
        if not self.batches.per_epoch:
            return
        evaluation = evaluate_loss(self.decoder, self.batches)
        self.points.append((self.state.step, evaluation.loss))
        self.folder.note(evals=self.points)
        self.tell(when, evaluation)
