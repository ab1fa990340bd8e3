"""A run on long text: joined documents, tiles, losses by position in the report, a warning past the model's length.

The model was made for 512 positions.
"""

import json

import pytest

LENGTH = 512


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("long") / "book.txt"
    path.write_text(" ".join(f"line {n % 100}: the sea was {n % 7} and the wind {n % 11}." for n in range(1500)))
    return path


@pytest.fixture(scope="module")
def command(tiny_model, book):
    return [
        *("run", "--model", tiny_model("llama"), "--dataset", book, "--join-documents", "--max-seq-len", LENGTH),
        *("--batch-size", 1, "--grad-accum", 2, "--max-steps", 6, "--lr", "1e-2", "--quant", "none", "--dtype", "fp32"),
        *("--recompute", "layer", "--eval-fraction", 0.1),
    ]


@pytest.fixture(scope="module")
def reports(effitrain, command, tmp_path_factory):
    """The same run with all tokens at once and in tiles."""
    made = {}
    for tiles in (1, 5):
        out = tmp_path_factory.mktemp("out") / str(tiles)
        done = effitrain(*command, "--mlp-tiles", tiles, "-o", out)
        assert done.code == 0, done.err
        made[tiles] = json.loads((out / "report.json").read_text()), out
    return made


def test_losses_by_position_are_reported(reports):
    report, out = reports[1]
    assert report["data"]["dropped"] == 1 and report["data"]["trained_share"] > 0.99
    buckets = report["positions"]
    assert [bucket["start"] for bucket in buckets] == list(range(0, LENGTH, buckets[0]["end"]))
    for when in ("before", "after"):
        total = sum(bucket[when] * bucket["tokens"] for bucket in buckets)
        mean = total / sum(bucket["tokens"] for bucket in buckets)
        assert report["loss"][f"eval_{when}"] == pytest.approx(mean, rel=1e-9)
    assert all(bucket["after"] < bucket["before"] for bucket in buckets)
    assert "Loss by position" in (out / "report.html").read_text()


def test_tiles_change_memory_and_not_the_losses(reports):
    (whole, _), (tiled, out) = reports[1], reports[5]
    for key in ("first", "last", "eval_before", "eval_after"):
        assert tiled["loss"][key] == pytest.approx(whole["loss"][key], rel=1e-4)
    assert tiled["memory"]["measured_peak_bytes"] < whole["memory"]["measured_peak_bytes"]
    for report in (whole, tiled):
        memory = report["memory"]
        assert memory["measured_peak_bytes"] == pytest.approx(memory["predicted_peak_bytes"], rel=0.05)
    assert "mlp_tiles: 5" in (out / "recipe.yaml").read_text()


def test_a_model_used_past_its_length_says_what_it_costs(effitrain, command, book):
    said = "Samples of up to 1100 tokens are longer than the 512 positions the model was made for: its loss is "
    common = ["eval", "--model", command[2], "--dataset", book, "--quant", "none", "--join-documents"]
    scores = json.loads(effitrain(*common, "--max-seq-len", 1100, "--json").out)
    assert scores["warnings"][0].startswith(said) and [b["end"] for b in scores["by_position"]][:2] == [256, 512]
    assert "Warning: Samples" in effitrain(*common, "--max-seq-len", 1100).out
    assert "warnings" not in json.loads(effitrain(*common, "--max-seq-len", 512, "--json").out)
