"""Going on with a run that was cut short: what is kept, what is repeated, what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

STEPS = 6


@pytest.fixture(scope="module")
def asked(tiny_model, counting) -> list[object]:
    """A short run on a tiny model; batch size and accumulation are left to the plan."""
    flags = ["--max-steps", STEPS, "--max-seq-len", 64, "--lora-r", 4, "--quant", "none", "--lr", "5e-3"]
    return ["run", "--quiet", "--model", tiny_model(), "--dataset", counting, *flags, "--save-every", 1]


@pytest.fixture(scope="module")
def full(effitrain, asked, tmp_path_factory) -> Path:
    """The folder of that run, finished, with every checkpoint; do not change it."""
    folder = tmp_path_factory.mktemp("full") / "out"
    answer = effitrain(*asked, "--keep-checkpoints", STEPS, "-o", folder)
    assert answer.code == 0, answer.err
    return folder


@pytest.fixture
def cut_short(full, tmp_path) -> Callable[..., Path]:
    """``cut_short(step, finished=full)``: a copy of a finished run as a kill after that step would have left it."""

    def cut(step: int, finished: Path = full) -> Path:
        folder = tmp_path / "cut"
        shutil.copytree(finished, folder)
        for later in range(step + 1, STEPS + 1):
            shutil.rmtree(folder / "checkpoints" / f"step-{later}")
        shutil.rmtree(folder / "adapter")
        for name in ("report.json", "report.html", "loss.png"):
            (folder / name).unlink()
        return folder

    return cut


def adapter(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_goes_on_from_the_newest_checkpoint_and_says_so(effitrain, asked, full, cut_short):
    folder = cut_short(3)
    answer = effitrain(*(part for part in asked if part != "--quiet"), "-o", folder)
    assert answer.code == 0, answer.err
    assert "step-3" in answer.out and "after step 3 of 6" in answer.out
    assert "Evaluation loss before" not in answer.out  # measured when the run began
    assert adapter(folder) == adapter(full) and losses(folder) == losses(full)
    before, after = (json.loads((path / "report.json").read_text()) for path in (full, folder))
    assert before["loss"] == after["loss"] and before["tokens"] == after["tokens"] and before["steps"] == after["steps"]


def test_lines_beyond_the_checkpoint_and_a_half_line_are_written_anew(effitrain, asked, full, cut_short):
    folder = cut_short(2)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    assert effitrain(*asked, "-o", folder).code == 0
    assert losses(folder) == losses(full)


def test_settings_of_the_plan_stay_what_they_were(effitrain, asked, full, cut_short, tmp_path):
    """Free memory is never twice the same: a resumed run that planned anew would change its batches half-way."""
    plan = json.loads((full / "plan.json").read_text())
    tight = ["--gpu-mem", plan["peak_bytes"] // 2, "--keep-checkpoints", STEPS]
    small = tmp_path / "small"
    assert effitrain(*asked, *tight, "-o", small).code == 0
    settings = json.loads((small / "plan.json").read_text())["settings"]
    assert settings != plan["settings"]

    folder = cut_short(3, small)
    assert effitrain(*asked, "-o", folder).code == 0
    assert json.loads((folder / "plan.json").read_text())["settings"] == settings
    assert adapter(folder) == adapter(small) and losses(folder) == losses(small)


def test_what_killed_writers_left_is_cleared(effitrain, asked, cut_short):
    folder = cut_short(3)
    for parent in (folder, folder / "checkpoints"):
        (parent / ".adapter.tmp-0123abcd").mkdir()
    assert effitrain(*asked, "-o", folder).code == 0
    assert not [name for parent in (folder, folder / "checkpoints") for name in names(parent) if name[0] == "."]


def test_resume_never_begins_again(effitrain, asked, full, cut_short):
    """Checkpoints of the attempt before, which may be newer, must not push out those of this one."""
    folder = cut_short(4)
    (folder / "checkpoints" / "step-4").rename(folder / "checkpoints" / "step-104")
    assert effitrain(*asked, "--resume", "never", "-o", folder).code == 0
    assert adapter(folder) == adapter(full) and losses(folder) == losses(full)
    assert names(folder / "checkpoints") == ["step-5", "step-6"]


def test_resume_from_a_named_checkpoint(effitrain, asked, full, cut_short):
    folder = cut_short(4)
    answer = effitrain(*asked, "--resume", folder / "checkpoints" / "step-2", "-o", folder)
    assert answer.code == 0, answer.err
    assert adapter(folder) == adapter(full) and losses(folder) == losses(full)


def test_a_run_that_never_trained_may_be_mended(effitrain, asked, tiny_model, tmp_path):
    """Weights that could not be loaded are got again, and the same command works."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model(), model)
    weights = model / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-4] + b"\xff\xff\xff\x7f")  # the last number is NaN
    command = [model if part == tiny_model() else part for part in asked]
    answer = effitrain(*command, "-o", tmp_path / "out")
    assert answer.code == 2 and "NaN" in answer.err
    weights.write_bytes(good)
    answer = effitrain(*command, "-o", tmp_path / "out")
    assert answer.code == 0, answer.err


@pytest.mark.parametrize("changed", ["model", "data"])
def test_other_inputs_under_the_same_name_are_refused(effitrain, asked, cut_short, digests, changed):
    folder = cut_short(3)
    trained = digests(folder / "checkpoints")
    notes = json.loads((folder / "run.json").read_text())
    notes["inputs"][changed] = "0" * 64
    (folder / "run.json").write_text(json.dumps(notes))
    answer = effitrain(*asked, "-o", folder)
    assert answer.code == 2 and f"{changed} changed" in answer.err
    assert digests(folder / "checkpoints") == trained


def test_a_damaged_checkpoint_is_named_and_nothing_is_lost(effitrain, asked, full, cut_short, digests):
    folder = cut_short(3)
    weights = folder / "checkpoints" / "step-3" / "trainable.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    before = digests(folder / "checkpoints")
    answer = effitrain(*asked, "-o", folder)
    assert answer.code == 2 and "step-3" in answer.err and "trainable.safetensors" in answer.err
    assert digests(folder / "checkpoints") == before and losses(folder) == losses(full)
