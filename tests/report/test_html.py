"""The report page: well-formed, needs nothing beside itself, shows what was measured, shows no markup of the user's."""

import base64
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from effitrain.report.html import STEP_ROWS, format_seconds, render_report
from effitrain.report.style import PAGE

PNG = b"\x89PNG not really"
VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Checks that tags nest; collects text, and every attribute that could fetch something."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.fetched: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [value for name, value in attrs if name in {"src", "href", "srcset", "data", "action"}]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def text_of(html: str) -> str:
    return " ".join(" ".join(Page(html).text).split())


@pytest.fixture
def report() -> dict:
    return {
        "model": "llama-3.1-8b",
        "fit": "resident",
        "method": "lora",
        "steps": 120,
        "tokens": 1_234_567,
        "seconds": 245.0,
        "tokens_per_second": 5039.0,
        "loss": {"first": 3.0, "last": 2.0, "eval_before": 2.5, "eval_after": 2.0},
        "memory": {
            "budget_bytes": 20 * 2**30,
            "predicted_peak_bytes": 10 * 2**30,
            "measured_peak_bytes": 9 * 2**30,
            "peak_rss_bytes": 3 * 2**30,
        },
        "data": {"samples": 2000, "trained_share": 0.4321, "truncated": 3, "dropped": 1},
        "stream": None,
        "prune": None,
        "positions": None,
        "lisa": None,
        "adapter": "adapter",
        "versions": {"torch": "2.13.0", "effitrain": "0.1.0"},
        "warnings": [],
    }


@pytest.fixture
def plan() -> dict:
    return {
        "ledger": [
            {"what": "frozen weights", "where": "gpu", "bytes": 6 * 2**30, "formula": "n x 0.516 B"},
            {"what": "adapter", "where": "gpu", "bytes": 4 * 2**30, "formula": "r x (in + out) x 4 B"},
            {"what": "embedding", "where": "host", "bytes": 2**30, "formula": "vocab x hidden x 2 B"},
        ],
        "reasons": ["The model fits as it is."],
        "settings": {"max_seq_len": 2048, "batch_size": 4, "dtype": "bf16", "lr": 2e-4},
    }


def metrics(count: int) -> list[dict]:
    line = {"lr": 1e-4, "grad_norm": 0.5, "tokens": 2048, "tokens_per_second": 900.0, "device_peak_bytes": 2**30}
    return [{"step": n + 1, "loss": 3.0, **line} for n in range(count)]


def test_says_what_was_measured(report, plan):
    text = text_of(render_report(report, plan, metrics(120), PNG))
    for shown in (
        *("llama-3.1-8b", "lora · resident", "Evaluation loss", "2.500 → 2.000", "-20.0%", "1,234,567", "4 min 05 s"),
        *("10.0 GiB (50% of the budget)", "9.0 GiB (45% of the budget)", "Device budget 20.0 GiB", "3.0 GiB of host"),
        *("frozen weights", "n x 0.516 B", "sum 10.0 GiB", "In host memory", "The model fits as it is."),
        *("2,048", "0.0002", "43.2%", "torch", "2.13.0"),
    ):
        assert shown in text, shown
    for absent in ("Warnings", "Streaming", "Pruning", "On disk"):
        assert absent not in text, absent


def test_lists_by_their_unit(report, plan):
    report["lisa"] = {"visits": [2, 0, 1], "state_bytes": [7_088_128, 7_088_128], "none_yet_bytes": []}
    text = text_of(render_report(report, plan, [], None))
    assert "visits 2, 0, 1 state bytes 6.8 MiB (all 2) none yet bytes none" in text


def test_needs_nothing_beside_itself(report, plan):
    html = render_report(report, plan, metrics(3), PNG)
    page = Page(html)
    assert page.fetched == ["data:image/png;base64," + base64.b64encode(PNG).decode()]
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not re.search(r"https?://|url\(|@import", html)


def test_steps_are_thinned_and_keep_both_ends(report, plan):
    table = render_report(report, plan, metrics(1000), None).split("<details>")[1].split("</details>")[0]
    rows = re.findall(r"<tbody>.*</tbody>", table)[0].count("<tr>")
    assert rows == STEP_ROWS and "<td>1</td>" in table and "<td>1,000</td>" in table
    assert "<img" not in render_report(report, plan, metrics(1), None)


@pytest.mark.parametrize("count", [0, 1])
def test_short_runs(report, plan, count):
    report["loss"] = dict.fromkeys(report["loss"]) if count == 0 else {**report["loss"], "eval_before": None}
    text = text_of(render_report(report, plan, metrics(count), None))
    assert ("not measured" if count == 0 else "Training loss 3.000 → 2.000") in text


def test_over_budget_and_warnings_show(report, plan):
    report["memory"]["measured_peak_bytes"] = 25 * 2**30
    report["warnings"] = ["Only 3 % of the tokens are trained."]
    html = render_report(report, plan, [], None)
    assert 'class="over" style="width:100.00%"' in html and 'style="left:80.00%"' in html
    assert "Only 3 % of the tokens are trained." in text_of(html)


def test_stream_and_prune_show_when_there(report, plan):
    report["stream"] = {"streamed_layers": 60, "bytes_copied": 3 * 2**40, "copy_seconds": 12.5, "hidden_share": 0.98}
    report["prune"] = {"ratio": 0.85, "parts": "ffn+kv"}
    text = text_of(render_report(report, plan, [], None))
    assert "streamed layers 60" in text and "3072 GiB" in text and "98.0%" in text and "ffn+kv" in text


def test_what_the_user_typed_is_text(report, plan):
    report["model"] = "<script>alert(1)</script>"
    report["warnings"] = ["a & b <b>"]
    plan["ledger"][0]["what"] = "<img src=x>"
    plan["settings"] = {"<i>": '"</td>'}
    page = Page(render_report(report, plan, metrics(2), None))
    assert "script" not in page.tags and page.fetched == []
    assert {"<script>alert(1)</script>", "a & b <b>", "<img src=x>", '"</td>'} <= set(page.text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (59.94, "59.9 s"),
        (60, "1 min 00 s"),
        (3599.4, "59 min 59 s"),
        (3600, "1 h 00 min"),
        (90_061, "25 h 01 min"),
    ],
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_the_ledger_is_a_bar_too(report, plan):
    page = render_report(report, plan, metrics(3), PNG)
    assert 'style="width:60.00%;background:#2a78d6" title="frozen weights 6.0 GiB"' in page
    assert 'style="width:40.00%;background:#d9622b" title="adapter 4.0 GiB"' in page
    assert page.count('<div class="stack">') == 2 and "embedding 1.0 GiB" in text_of(page)


def test_losses_by_position(report, plan):
    assert "Loss by position" not in render_report(report, plan, metrics(2), PNG)
    report["positions"] = [
        {"start": 0, "end": 1024, "tokens": 5000, "before": 2.5, "after": 2.25},
        {"start": 1024, "end": 2048, "tokens": 4000, "before": 9.0, "after": 2.125},
    ]
    page = render_report(report, plan, metrics(2), PNG, None, PNG)
    assert "1,024 to 2,047 4,000 9.0000 2.1250" in text_of(page) and 'alt="Loss by position"' in page


def test_samples_show_before_and_after(report, plan):
    cases = [({}, "no sample of"), ({"stream": {"layers": 1}}, "layers stream"), ({"prune": {"a": 1}}, "a small model")]
    none = {"loss": {"first": 3.0, "last": 2.0, "eval_before": None, "eval_after": None}}
    for fields, why in (*cases, (none, "there is no evaluation set")):
        page = render_report({**report, **fields}, plan, metrics(2), PNG)
        assert f"Samples No answers: {why}" in text_of(page)
    report["samples"] = [{"prompt": "Say <b>\n", "wanted": "yes", "before": " \n", "after": "yes & no"}]
    page = render_report(report, plan, metrics(2), PNG)
    assert "Samples Say <b> in the data yes before training nothing after training yes & no" in text_of(page)


def test_everything_that_a_run_can_have_is_there(report, plan):
    """Loss, learning rate, memory predicted and measured, throughput, timeline, loss by position, samples."""
    report["stream"] = {"streamed_layers": 60}
    report["positions"] = [{"start": 0, "end": 1024, "tokens": 5000, "before": 2.5, "after": 2.25}]
    report["samples"] = [{"prompt": "a", "wanted": "b", "before": "c", "after": "d"}]
    lines = [{**line, "lr": 1e-4 * (1 + n), "tokens_per_second": 900.0 + n} for n, line in enumerate(metrics(40))]
    html = render_report(report, plan, lines, PNG, PNG, PNG)
    text, page = text_of(html), Page(html)
    for part in ("Loss", "Samples", "Training by step", "Loss by position", "Memory", "Streaming"):
        assert f"<h2>{part}</h2>" in html
    for shown in ("Learning rate: 1.00e-04 to 4.00e-03", "Tokens per second: 900 to 939", "planned", "measured"):
        assert shown in text
    assert re.findall(r'alt="([^"]*)"', html) == ["Loss by step", "Loss by position", "Layers by time"]
    assert page.tags.count("svg") == 3


def test_curves_are_drawn_within_their_frame(report, plan):
    lines = [{**line, "lr": value} for line, value in zip(metrics(1000), [0.0, 1e-3] * 500, strict=True)]
    html = render_report(report, plan, lines, None)
    assert html.count("<svg ") == html.count('<svg viewBox="0 0 600 90"') == 3
    for points in re.findall(r'points="([^"]+)"', html):
        pairs = [tuple(map(float, point.split(","))) for point in points.split()]
        assert len(pairs) == 300 and pairs[0][0] == 6 and pairs[-1][0] == 594
        assert all(a < b for (a, _), (b, _) in pairwise(pairs)) and all(0 < y < 90 for _, y in pairs)
    assert "Device peak so far: 1.0 GiB in every step" in html


def test_it_is_read_on_a_phone(report, plan):
    """The width is the device's, what is wide scrolls by itself, and nothing else asks for a width of its own."""
    report["stream"], report["warnings"] = {"streamed_layers": 60}, ["word " * 60]
    html = render_report(report, plan, metrics(40), PNG, PNG, PNG)
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    for tag in ("table", "img"):
        assert html.count(f"<{tag}") == len(re.findall(rf'<div class="wide"><{tag}', html)) > 0
    narrow = PAGE.split("@media (max-width: 40rem)")[1]
    assert ".wide { overflow-x: auto; }" in PAGE and "grid-template-columns: 1fr" in narrow
    fixed = re.findall(r"([^{}]+)\{[^{}]*?[; {](?:min-)?width:\s*\d+(?:rem|em|px)", PAGE)
    assert {selector.strip() for selector in fixed} <= {"img", ".track i", ".track b", ".stack i", ".legend i"}
