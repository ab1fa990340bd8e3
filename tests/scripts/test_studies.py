"""The studies: single runs of them, their records, and the tables in the docs; ``test_results`` has their bounds.

``slow``: the short forms of whole studies.
"""

import importlib
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"


@pytest.fixture
def script(monkeypatch):
    """``script(name)``: a script, or a module of what they share, imported for one test."""
    monkeypatch.syspath_prepend(SCRIPTS)
    yield importlib.import_module
    for name in [name for name in sys.modules if name.partition(".")[0].startswith(("study", "bench_s2"))]:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["study_loram", "study_loraprune"])
def test_the_docs_show_what_was_measured(script, name):
    runs = json.loads((ROOT / f"docs/{name}.json").read_text())["runs"]
    assert f"<!-- {name} -->\n{script(name).table(runs)}\n<!-- /{name} -->" in (ROOT / "docs/pruning.md").read_text()


def test_the_docs_show_what_longlora_measured(script):
    page = (ROOT / "docs/longlora.md").read_text()
    runs = json.loads((ROOT / "docs/study_longlora.json").read_text())["runs"]
    bench = json.loads((ROOT / "benchmarks/s2.json").read_text())
    assert f"<!-- study_longlora -->\n{script('study_longlora').table(runs)}\n<!-- /study_longlora -->" in page
    assert f"<!-- bench_s2 -->\n{script('bench_s2').table(bench)}\n<!-- /bench_s2 -->" in page


def test_the_docs_show_what_lisa_measured(script):
    study, page = json.loads((ROOT / "docs/study_lisa.json").read_text()), (ROOT / "docs/lisa.md").read_text()
    assert f"<!-- study_lisa -->\n{script('study_lisa').table(study)}\n<!-- /study_lisa -->" in page
    sides = json.loads((ROOT / "benchmarks/lisa.json").read_text())["sides"]
    for side in ("lisa-lora", "lisa", "lisa-delta, rank 64", "lisa, embeddings too", "full"):
        assert f"| {sides[side]['memory_of_lora']:.2f} |" in page


def test_a_short_form_of_longlora(script, data_dir, monkeypatch):
    """Two steps on 640 tokens: both arms get better than untrained, and shifted attention is another course."""
    study = script("study_longlora")
    monkeypatch.setattr(study, "BOOKS", study.BOOKS[1:])  # the shorter one
    losses = {arm: study.measure(data_dir, 2, 640, 2, {"arm": arm})["losses"] for arm in list(study.ARMS)[1:]}
    untrained, full, sparse = losses.values()
    assert max(sum(full), sum(sparse)) < sum(untrained) and full != sparse


def test_the_bench_of_shifted_attention(script, monkeypatch):
    from effitrain.model import blocks

    bench = script("bench_s2")
    monkeypatch.setattr(blocks, "attention", bench.timed)
    found = bench.compare(bench.model(), [96, 32], 24, 1)
    assert found["pairs_ratio"] < 0.5 and all(found[kind]["attention_seconds"] > 0 for kind in ("full", "s2"))
    assert found["full"]["peak_bytes"] > 0 and found["lengths"] == [96, 32]


def test_an_interrupted_study_goes_on(script, tmp_path):
    record, file, runs = script("study.record"), tmp_path / "new/study.json", [{"seed": 0}, {"seed": 1}]
    record.Record(file, {"steps": 3}, 1, partial(dict, loss=1.0)).complete(runs[:1])
    found = record.Record(file, {"steps": 3}, 1, partial(dict, loss=2.0)).complete(runs)
    assert found == [{"seed": 0, "loss": 1.0}, {"seed": 1, "loss": 2.0}]
    written = json.loads(file.read_text())
    assert written.pop("machine")["cores"] == os.cpu_count() and written == {"steps": 3, "runs": found}
    with pytest.raises(SystemExit, match="holds another study"):
        record.Record(file, {"steps": 4}, 1, dict)


def test_only_what_stands_between_the_marks_is_replaced(script, tmp_path):
    (tmp_path / "doc.md").write_text("a\n<!-- t -->\nold\n<!-- /t -->\nb\n")
    script("study.record").put_between_marks(tmp_path / "doc.md", "t", "new")
    assert (tmp_path / "doc.md").read_text() == "a\n<!-- t -->\nnew\n<!-- /t -->\nb\n"


def test_a_run_of_each_study(script, data_dir):
    """One step: what comes of it is worse than the model as it is, and the recovered adapter does no harm."""
    loram, loraprune = script("study_loram"), script("study_loraprune")
    base = loram.measure(data_dir, 1, 4, {"what": "base"})["loss"]
    cut = {"what": "pruned", "seed": 0, "ratio": 0.5, "score": "wanda", "parts": "ffn", "align": "none"}
    figures = loram.measure(data_dir, 1, 4, cut)
    assert figures["small_before"] > base and figures["recovered"] < base + 0.1
    whole = loraprune.measure(data_dir, 2, 4, {"method": "none"})["perplexity"]
    for method in ("loraprune", "magnitude"):
        figures = loraprune.measure(data_dir, 2, 4, loraprune.pruned(method))
        assert figures["perplexity"] > whole and [len(heads) for heads in figures["kv_heads"]] == [1] * 4
    parts = loraprune.measure(data_dir, 2, 4, {"why": "exact", "rank": 4, "lr": 2e-3})
    assert min(parts.values()) > whole and len(set(parts.values())) == 5
    assert loraprune.table_of_why([{"why": "exact", "rank": 4, **parts}]).count("| whole | 4 |") == 1


def study(name: str, data: Path, out: Path) -> tuple[dict, str]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", SCRIPTS / f"{name}.py", "-o", out, "--quick"],
        env={**os.environ, "EFFITRAIN_DATA": str(data)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (out / f"{name}.png").stat().st_size > 1000
    return json.loads((out / f"{name}.json").read_text()), done.stdout


@pytest.mark.slow
def test_loram(data_dir, tmp_path):
    """After a few steps alignment already brings more of the gain to the full model."""
    found, printed = study("study_loram", data_dir, tmp_path)
    runs = {run.get("align", run["what"]): run for run in found["runs"]}
    plain, aligned = runs["none"], runs["lsq"]
    assert aligned["small_before"] < plain["small_before"] and aligned["recovered"] < runs["base"]["loss"]
    assert printed.count("| ffn | wanda |") == 2


@pytest.mark.slow
def test_loraprune(data_dir, tmp_path):
    found, printed = study("study_loraprune", data_dir, tmp_path)
    perplexities = {run["method"]: run["perplexity"] for run in found["runs"]}
    assert len(perplexities) == 5 and min(perplexities, key=perplexities.get) == "none"
    assert printed.count("| 0.5 |") == 4
