"""What a run tells while it works."""

from effitrain.core.plan import Plan
from effitrain.data.prepare import PreparedData
from effitrain.evals.perplexity import Evaluation
from effitrain.train.hooks import StepRecord


class Events:
    """What ``run`` tells while it works; every method does nothing. The command line prints from here."""

    def note(self, text: str) -> None:
        """Something worth knowing."""

    def planned(self, plan: Plan) -> None:
        """The plan, before anything is loaded."""

    def loaded(self, part: str, layers: int) -> None:
        """A layer of ``layers`` is in place."""

    def stored(self, done: int, parts: int) -> None:
        """``done`` of ``parts`` of the store that layers stream from are built."""

    def data(self, data: PreparedData) -> None:
        """The data, with one masked sample."""

    def evaluated(self, when: str, evaluation: Evaluation) -> None:
        """A loss on the evaluation set: ``before``, ``after`` or ``step N``."""

    def training(self, done: int, steps: int) -> None:
        """Training begins, or goes on, at step ``done``."""

    def step(self, record: StepRecord) -> None:
        """A step is done."""
