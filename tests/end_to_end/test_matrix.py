"""Everything composes: ways to fit, quantisation, methods, attention, packing, and how a run ends.

Every cell of the matrix is trained and agrees with its simplest equivalent, as exactly as ``equivalent`` says, or is
refused before anything is loaded, as ``REFUSALS`` says. By default cells are run that hold every pair of choices which
goes together and one of each that does not; ``-m slow`` runs all others (``benchmarks/slow_checks.md``).
"""

import hashlib
import itertools
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from killed import Killed
from safetensors.torch import load_file, save_file

from effitrain import api
from effitrain.core.errors import InputError, Interrupted
from effitrain.core.rules import MADE_BY
from effitrain.planning import recipe

STEPS, ROW, GROUP, WIDE_GROUP = 3, 96, 16, 94  # the longest sample has at most half of WIDE_GROUP, and more than GROUP


class Cell(NamedTuple):
    """One choice of each; ``VALUES`` begin with the simplest."""

    fit: str
    quant: str
    method: str
    attention: str
    packing: str
    ending: str

    def __str__(self) -> str:
        return "-".join(self)


VALUES = Cell(  # type: ignore[arg-type]
    fit=("resident", "stream", "prune", "prune+stream"),
    quant=("none", "nf4"),
    method=("lora", "lisa-lora", "lisa-delta", "lisa", "full", "loraprune"),
    attention=("full", "s2"),
    packing=("apart", "packed"),
    ending=("whole", "killed", "stopped"),
)
CELLS = [Cell(*values) for values in itertools.product(*VALUES)]

# What does not go together, and words of what is said.
REFUSALS: list[tuple[Callable[[Cell], bool], tuple[str, ...]]] = [
    (lambda c: c.method == "full" and c.quant == "nf4", ("--method full", "--quant nf4 freezes", "use --quant none")),
    (lambda c: c.method == "full" and c.fit == "stream", ("--method full", "layers that stream")),
    (lambda c: c.method == "full" and "prune" in c.fit, ("--method full", "pruned one nothing can be recovered")),
    (lambda c: c.method == "lisa" and "prune" in c.fit, ("--method lisa", "pruned one nothing can be recovered")),
    (lambda c: c.method == "lisa-delta" and "prune" in c.fit, ("--method lisa-delta", "pruned")),
    (lambda c: c.method == "lisa-lora" and "prune" in c.fit, ("--method lisa-lora", "pruned model differ")),
    (lambda c: c.method == "loraprune" and "prune" not in c.fit, ("--prune-method loraprune is for --fit prune",)),
    (lambda c: c.method == "loraprune" and c.fit == "prune+stream", ("--resident-layers", "--prune-method loraprune")),
]


def refusal(cell: Cell) -> tuple[str, ...]:
    """Words of the message that refuses ``cell``; none where it is trained."""
    return next((words for refuses, words in REFUSALS if refuses(cell)), ())


class Equivalent(NamedTuple):
    """A run that a cell must agree with: losses within ``tolerance``, and to the bit where that is 0."""

    cell: Cell
    how: str
    tolerance: float
    cells_how: str = ""  # where it is not the cell as it stands that agrees


def equivalent(cell: Cell) -> Equivalent | None:
    """The simplest run that computes what ``cell`` does; None for the simplest cells."""
    if cell.ending != "whole":
        return Equivalent(cell._replace(ending="whole"), "", 0)
    if "stream" in cell.fit:
        return Equivalent(cell._replace(fit={"stream": "resident"}.get(cell.fit, "prune")), "", 0)
    if cell.packing == "packed":  # the same samples in every step, summed up in another order
        return Equivalent(cell._replace(packing="apart"), "", 1e-5)
    if cell.fit == "prune" and cell.method != "loraprune":
        return Equivalent(cell, "through files", 0)
    if cell.attention == "s2":  # where no sample is longer than half a group
        return Equivalent(cell._replace(attention="full"), "", 1e-5, "wide group")
    if cell.method == "lisa-lora":  # where all layers are trained at a time
        return Equivalent(cell._replace(method="lora"), "", 0, "all layers")
    if cell.method == "lisa" and cell.quant == "none":
        return Equivalent(cell._replace(method="full"), "", 1e-6, "all layers")  # the norm sums in another order
    if cell.method == "lora" and cell.quant == "nf4":
        return Equivalent(cell._replace(quant="none"), "rounded weights", 1e-5)
    return None


def covering(cells: list[Cell]) -> list[Cell]:
    """Few of ``cells`` that hold every pair of choices found in any of them; the same ones each time."""
    pairs = {cell: {*itertools.combinations(enumerate(cell), 2)} for cell in cells}
    left, chosen = set.union(*pairs.values()), list[Cell]()
    while left:
        chosen.append(max(cells, key=lambda cell: len(pairs[cell] & left)))
        left -= pairs[chosen[-1]]
    return chosen


TRAINED, REFUSED = [c for c in CELLS if not refusal(c)], [c for c in CELLS if refusal(c)]
FEW = [*covering(TRAINED), *(next(c for c in REFUSED if refuses(c)) for refuses, _ in REFUSALS)]


class Result(NamedTuple):
    """What a run left: the loss of every step, those of the report, digests of the weights it is for, its plan."""

    steps: list[float]
    ends: list[float]
    weights: dict[str, str]
    plan: dict[str, Any]


class Ends(api.Events):
    """Ends a run after its second step, before that is saved or with it."""

    def __init__(self, ending: str):
        self.ending = ending

    def step(self, record: Any) -> None:
        if record.step == 2 and self.ending == "killed":
            raise Killed
        if record.step == 2 and self.ending == "stopped":
            os.kill(os.getpid(), signal.SIGTERM)


class Matrix:
    """Runs cells, each once, on one model and data set; ``how`` names a departure from the cell as it stands."""

    def __init__(self, model: Path, rows: Path, folder: Path):
        self.model, self.rows, self.folder = model, rows, folder
        self.results: dict[tuple[Cell, str], Result] = {}

    def result(self, cell: Cell, how: str = "") -> Result:
        if (cell, how) not in self.results:
            self.results[cell, how] = self._run(cell, how)
        return self.results[cell, how]

    def fields(self, cell: Cell, how: str) -> dict[str, Any]:
        """A step takes all eight samples: as two micro-batches of four, or packed as two of two rows of two."""
        by_turns, prunes = cell.method.startswith("lisa"), "prune" in cell.fit
        masters = cell.method in ("full", "lisa", "lisa-delta")
        model = self._rounded() if how == "rounded weights" else self.model
        made = {
            "model": str(model), "dataset": str(self.rows), "eval_dataset": str(self.rows), "quant": cell.quant,
            "fit": "prune" if prunes else cell.fit, "method": cell.method, "attention": cell.attention,
            "packing": cell.packing == "packed", "batch_size": 2 if cell.packing == "packed" else 4, "grad_accum": 2,
            "max_steps": STEPS, "max_seq_len": ROW, "lr": 3e-3 if masters else 1e-2, "save_every": 1, "dtype": "fp32",
            "template": "plain", "recompute": "layer", "offload_activations": "off",
            "gpu_mem": 2**33, "host_mem": 2**33,
        }  # fmt: skip
        if "stream" in cell.fit:
            made |= {"resident_layers": 0}
        if prunes:
            made |= {"prune_ratio": 0.5, "prune_exempt": (1, 1)}
        if cell.method == "loraprune":
            made |= {"method": "lora", "prune_method": "loraprune"}
        elif prunes:
            made |= {"prune_score": "magnitude", "align": "none"}
        if cell.attention == "s2":
            made |= {"s2_group": WIDE_GROUP if how == "wide group" else GROUP}
        if by_turns:
            made |= {"lisa_interval": 1, "lisa_layers": 4 if how == "all layers" else 2}
        return made

    def _run(self, cell: Cell, how: str) -> Result:
        out = self.folder / f"{len(self.results)}-{cell.ending}"
        fields = self.fields(cell, how)
        if how == "through files":
            small = {"output_dir": str(out.with_name(f"{out.name}-small"))}
            api.prune(recipe(**fields, **small))
            fields = {name: value for name, value in fields.items() if name not in MADE_BY}
            fields = {**fields, "small_model": small["output_dir"]}
        asked = recipe(**fields, output_dir=str(out))
        if cell.ending != "whole":
            with pytest.raises((Killed, Interrupted)):
                api.run(asked, Ends(cell.ending))
        report = api.run(asked)
        assert report is not None
        steps = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        kept = sorted(
            path
            for part in ("adapter", "adapter-small", "model", "model-nf4")
            for path in (out / part).glob("*.safetensors")
        )
        weights = {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}
        return Result(steps, list(vars(report.loss).values()), weights, json.loads((out / "plan.json").read_text()))

    def _rounded(self) -> Path:
        """The model with the weights that NF4 makes of the decoder's linears."""
        from effitrain.quant.nf4 import dequantize, quantize

        folder = self.folder / "rounded"
        if not folder.exists():
            folder.mkdir()
            for path in self.model.iterdir():
                (folder / path.name).write_bytes(path.read_bytes())
            weights = load_file(folder / "model.safetensors")
            for name, tensor in weights.items():
                if name.endswith("_proj.weight"):
                    weights[name] = dequantize(quantize(tensor), torch.float32)
            save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder


@pytest.fixture(scope="module")
def matrix(tiny_model, tmp_path_factory) -> Iterator[Matrix]:
    """One model with grouped heads, eight samples of 34 to 46 tokens, and a cache that all runs share."""
    folder = tmp_path_factory.mktemp("matrix")
    rows = [
        {"prompt": f"Say {i}", "completion": "abcdefg "[i:] + "x" * (40 - 5 + i - len("abcdefg "[i:]))}
        for i in range(8)
    ]
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("effitrain.report.files.loss_png", lambda *drawn: b"")  # drawing takes longer than training
        patch.setattr("effitrain.training.choose", lambda tokens: ())  # and so do answers: tests/evals/test_samples.py
        yield Matrix(tiny_model("llama", layers=4), path, folder)


@pytest.fixture(autouse=True)
def _one_cache(matrix, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(matrix.folder / "cache"))


def check(matrix: Matrix, cell: Cell) -> None:
    """Train ``cell`` and compare; or see it refused."""
    if words := refusal(cell):
        return check_refused(matrix, cell, words)
    result = matrix.result(cell)
    check_effect(cell, result)
    if other := equivalent(cell):
        one, two = matrix.result(cell, other.cells_how), matrix.result(other.cell, other.how)
        if other.tolerance:
            assert one.steps == pytest.approx(two.steps, rel=other.tolerance)
            assert one.ends == pytest.approx(two.ends, rel=other.tolerance)
        else:
            assert one[:3] == two[:3]


def check_effect(cell: Cell, result: Result) -> None:
    """The plan has what the cell asks for, and every step learned from finite losses."""
    plan = result.plan
    assert plan["fit"] == cell.fit.partition("+")[0]
    assert (plan["settings"]["streamed"] > 0) == ("stream" in cell.fit)
    assert plan["settings"]["s2_group"] == (GROUP if cell.attention == "s2" else None)
    assert len(result.steps) == STEPS and result.steps[-1] < result.steps[0]


def check_refused(matrix: Matrix, cell: Cell, words: tuple[str, ...]) -> None:
    """One message says why and what to do, before there is a plan, a file or a loaded layer."""
    out, told = matrix.folder / f"refused-{cell}", []

    class Listens(api.Events):
        def planned(self, plan: Any) -> None:
            told.append(plan)

    with pytest.raises(InputError) as refused:
        api.run(recipe(**matrix.fields(cell, ""), output_dir=str(out)), Listens())
    error = refused.value
    assert all(word in str(error) for word in words), str(error)
    assert error.next_step and not told and not out.exists()


@pytest.mark.parametrize("cell", FEW, ids=str)
def test_few_cells(matrix, cell):
    check(matrix, cell)


@pytest.mark.slow
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell not in FEW], ids=str)
def test_all_other_cells(matrix, cell):
    check(matrix, cell)
