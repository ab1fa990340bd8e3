"""report.json has exactly the contract's keys, is plain JSON, and reads back to the same value."""

import json

import pytest

from effitrain.core.report import DataUse, Losses, Memory, Report

KEYS = {
    *("model", "fit", "method", "steps", "tokens", "seconds", "tokens_per_second", "loss", "memory", "data"),
    *("stream", "prune", "lisa", "positions", "samples", "rope", "adapter", "versions", "warnings"),
}


@pytest.fixture
def report() -> Report:
    return Report(
        model="tiny",
        fit="resident",
        method="lora",
        steps=10,
        tokens=5000,
        seconds=2.5,
        loss=Losses(first=3.0, last=2.0, eval_before=3.1, eval_after=None),
        memory=Memory(100, 90, 80, 400),
        data=DataUse(samples=7, trained_share=0.5, truncated=1, dropped=2),
        versions={"torch": "2.13.0"},
        warnings=("slow",),
    )


def test_keys_are_the_contract(report):
    content = report.to_json()
    assert set(content) == KEYS
    assert set(content["loss"]) == {"first", "last", "eval_before", "eval_after"}
    assert set(content["memory"]) == {
        *("budget_bytes", "predicted_peak_bytes", "measured_peak_bytes", "peak_rss_bytes"),
    }
    assert set(content["data"]) == {"samples", "trained_share", "truncated", "dropped"}
    assert content["tokens_per_second"] == 2000
    assert (
        content["stream"] is None
        and content["prune"] is None
        and content["lisa"] is None
        and content["adapter"] == "adapter"
    )


def test_reads_back_what_it_wrote(report, tmp_path):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report.to_json(), allow_nan=False))
    assert Report.read(path) == report


def test_no_time_means_no_speed(report):
    from dataclasses import replace

    assert replace(report, seconds=0.0, tokens=0).to_json()["tokens_per_second"] == 0.0
