"""Runs that end as a kill would end them; found by pytest's ``pythonpath``."""

from effitrain.evals.events import Events
from effitrain.train.hooks import StepRecord


class Killed(BaseException):
    """Ends a run where it is raised: nothing catches it, and no further checkpoint is taken."""


class KilledAfter(Events):
    """Ends a run at the end of a step."""

    def __init__(self, last: int):
        self.last = last

    def step(self, record: StepRecord) -> None:
        """Raise at the last one."""
        if record.step == self.last:
            raise Killed
