"""The runs of a study: each is done once, in worker processes, and written down as soon as its figures are known."""

import json
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from study.measured import machine

Run = dict[str, Any]
Figures = dict[str, Any]


class Record:
    """A JSON file that holds what all runs of a study have in common, when and where the last was measured, and every
    run with its figures.

    Args:
        file: read if it is there, so that an interrupted study goes on.
        facts: what the runs have in common.
        workers: processes of one thread each.
        measure: a module-level function from a run to its figures.
    """

    def __init__(self, file: Path, facts: Figures, workers: int, measure: Callable[[Run], Figures]):
        self.file, self.facts, self.workers, self.measure = file, facts, workers, measure
        self.runs: list[Run] = []
        self.machine: Figures = {}
        if file.exists():
            known = json.loads(file.read_text(encoding="utf-8"))
            self.runs, self.machine = known.pop("runs"), known.pop("machine", {})
            if known != facts:
                raise SystemExit(f"{file} holds another study: {known}, not {facts}. Name another folder with -o.")

    def complete(self, runs: Sequence[Run]) -> list[Run]:
        """``runs`` with their figures; what the file does not hold is measured."""
        missing = [run for run in runs if self._find(run) is None]
        self.machine = machine() if missing else self.machine
        os.environ["OMP_NUM_THREADS"] = "1"  # of the workers: two spinning teams on two cores take longer than one
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.workers, spawn) as pool:
            asked = {pool.submit(self.measure, run): run for run in missing}
            for done in as_completed(asked):
                self._add({**asked[done], **done.result()})
        return [found for run in runs if (found := self._find(run))]

    def _find(self, run: Mapping[str, Any]) -> Run | None:
        return next((known for known in self.runs if run.items() <= known.items()), None)

    def _add(self, run: Run) -> None:
        self.runs.append(run)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n  ".join(json.dumps(run) for run in self.runs)
        facts = json.dumps({**self.facts, "machine": self.machine})[1:-1]
        self.file.write_text(f'{{{facts}, "runs": [\n  {lines}\n]}}\n', encoding="utf-8")
        print(run, flush=True)


def put_between_marks(document: Path, mark: str, text: str) -> None:
    """Replace what stands between ``<!-- mark -->`` and ``<!-- /mark -->`` in a document."""
    before, begin, rest = document.read_text(encoding="utf-8").partition(f"<!-- {mark} -->\n")
    _, end, after = rest.partition(f"<!-- /{mark} -->")
    assert begin and end, f"{document} lacks the marks {mark}"
    document.write_text(f"{before}{begin}{text}\n{end}{after}", encoding="utf-8")
