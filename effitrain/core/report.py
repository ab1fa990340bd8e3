"""The report of a run, as one frozen value: what was trained, how well, at what cost."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Losses:
    """Mean cross-entropy per trained token, in nats.

    ``first`` and ``last`` are of single training steps, None when no step was taken; ``eval_before`` and ``eval_after``
    are of the full-size model on the evaluation set, None without one.
    """

    first: float | None
    last: float | None
    eval_before: float | None
    eval_after: float | None


@dataclass(frozen=True)
class Memory:
    """Bytes: the device budget, the plan's peak, the measured peak of the same, and the process's resident peak."""

    budget_bytes: int
    predicted_peak_bytes: int
    measured_peak_bytes: int
    peak_rss_bytes: int


@dataclass(frozen=True)
class DataUse:
    """Samples kept, evaluation split included; the trained share (0 to 1) of their tokens; samples cut short and
    left out.
    """

    samples: int
    trained_share: float
    truncated: int
    dropped: int


@dataclass(frozen=True)
class Report:
    """A finished run.

    ``tokens`` went through the model in ``seconds`` of training, evaluation not counted; ``adapter`` is the adapter's
    folder inside the run folder; ``stream``, ``prune`` and ``lisa`` are None where the run did none of it.
    ``positions``: of each bucket of positions ``start`` and ``end``, the ``tokens`` scored, and their loss ``before``
    and ``after`` training; None where samples are short. ``samples``: a few prompts of the evaluation set, the answer
    ``wanted``, and those ``before`` and ``after`` training; None where none were asked for. ``rope``: how positions
    were scaled; None where they were not.
    """

    model: str
    fit: str
    method: str
    steps: int
    tokens: int
    seconds: float
    loss: Losses
    memory: Memory
    data: DataUse
    versions: Mapping[str, str]
    warnings: tuple[str, ...] = ()
    adapter: str | None = "adapter"
    stream: Mapping[str, Any] | None = None
    prune: Mapping[str, Any] | None = None
    positions: Sequence[Mapping[str, Any]] | None = None
    samples: Sequence[Mapping[str, str]] | None = None
    rope: Mapping[str, Any] | None = None
    lisa: Mapping[str, Any] | None = None

    @property
    def tokens_per_second(self) -> float:
        """Mean over the training time; 0 before any time has passed."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def trained_small(self) -> bool:
        """Whether training losses are those of a pruned model, whose adapter was recovered for the full one."""
        return self.prune is not None and self.adapter is not None

    def to_json(self) -> dict[str, Any]:
        """The content of ``report.json``."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second, "warnings": list(self.warnings)}

    @staticmethod
    def read(path: str | Path) -> "Report":
        """The report whose ``to_json`` was written to ``path``."""
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        del content["tokens_per_second"]
        parts: dict[str, Any] = {
            "loss": Losses(**content.pop("loss")),
            "memory": Memory(**content.pop("memory")),
            "data": DataUse(**content.pop("data")),
            "warnings": tuple(content.pop("warnings")),
        }
        return Report(**content, **parts)
