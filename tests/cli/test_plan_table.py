"""A plan on a terminal: within its columns, no line ends in blanks, no word is lost, with colour and without."""

import dataclasses
import io
import re

import pytest
from rich.console import Console as Terminal

from effitrain.cli.plan_table import print_plan
from effitrain.io.hub import find_model
from effitrain.planning import explained, plan, recipe

ESCAPE = re.compile(r"\x1b\[[\d;]*m")
ASKED = {
    "streams": {"model": "llama-70b", "gpu": "rtx4090", "host_mem": "64G"},
    "from the disk": {"model": "llama-405b", "gpu_mem": "24G", "host_mem": "64G"},
    "by turns": {"model": "llama-3.1-8b", "gpu": "rtx4090", "method": "lisa", "host_mem": "64G"},
    "pruned": {"model": "llama-70b", "gpu": "rtx4090", "fit": "prune", "host_mem": "64G"},
    "in tiles": {"model": "llama-3.1-8b", "gpu_mem": "8G", "max_seq_len": 65536, "host_mem": "64G"},
    "does not fit": {"model": "llama-70b", "gpu_mem": "5G", "host_mem": "16G"},
    "small": {"model": "tiny", "host_mem": "8G"},
}


def shown(made, width: int, colour: bool) -> str:
    file = io.StringIO()
    print_plan(made, Terminal(file=file, width=width, force_terminal=colour, highlight=False), others=True)
    return file.getvalue()


@pytest.mark.parametrize("fields", ASKED.values(), ids=ASKED)
def test_no_line_is_too_wide_or_ends_in_blanks(fields):
    made = plan(recipe(**fields))
    for width in (80, 100, 60):
        plain, coloured = shown(made, width, False), shown(made, width, True)
        assert "\x1b" not in plain and ESCAPE.sub("", coloured) == plain != coloured
        for line in plain.splitlines():
            assert len(line) <= width and line == line.rstrip(" ")


@pytest.mark.parametrize("fields", ASKED.values(), ids=ASKED)
def test_every_reason_and_setting_is_there(fields):
    made = plan(recipe(**fields))
    running = re.sub(r"\s+", " ", shown(made, 80, False))
    assert made.reasons and all(f"- {reason}" in running for reason in made.reasons)
    assert f"optimizer {made.settings.optimizer}, lr" in running
    assert all(way.why in running for way in made.alternatives if way.fits)


def test_on_a_cpu_no_device_is_spoken_of():
    """Its memory is the host's: the budget counts the tensors of the step."""
    made = plan(recipe(model="llama-3.1-8b", host_mem="8G", dtype="fp32", max_seq_len=512))
    words = re.sub(r"\s+", " ", shown(made, 100, False))
    assert not made.overhead_bytes and " in tensors, " in words and "for the rest of the process." in words
    assert "on the device" not in words and " device " not in words.replace("the device twice", "")


def test_no_setting_is_torn_apart():
    words = shown(plan(recipe(**ASKED["from the disk"])), 80, False).splitlines()[2:5]
    assert [line[-1] for line in words[:-1]] == [",", ","]
    assert "125 of them from the disk" in " ".join(words) and "6 micro-batches at once" in " ".join(words)


def test_no_offer_is_torn_apart():
    made = plan(recipe(model="llama-3.1-8b", gpu_mem="6G", host_mem="64G", fit="resident"))
    offers = [shown(made, width, False).partition("Try ")[2] for width in range(50, 100)]
    assert all("--fit prune --prune-ratio 0.5" in offered for offered in offers)


def test_the_command_minds_columns_and_no_color(effitrain, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    out = effitrain("plan", "--model", "llama-70b", "--gpu", "rtx4090", "--host-mem", "64G").out
    assert "\x1b" not in out and not [line for line in out.splitlines() if len(line) > 80 or line.endswith(" ")]
    assert out.startswith("llama-70b (70.6B parameters), stream: fits.\nPeak ")


@pytest.mark.parametrize(
    ("stored", "size"),
    [
        ({}, "15.0 GiB"),
        ({"torch_dtype": "float32"}, "29.9 GiB"),
        ({"dtype": "float16"}, "15.0 GiB"),
        # 6,979,321,856 weights in 0.5159 B, and 1,050,939,392 of embedding, head and norms in 2 B
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "5.3 GiB"),
    ],
)
def test_a_download_is_as_large_as_the_checkpoint_is_stored(stored, size):
    asked = recipe(model="llama-3.1-8b", gpu="rtx4090", host_mem="64G")
    source = find_model("llama-3.1-8b")
    source = dataclasses.replace(source, config={**source.config, **stored})
    bare = dataclasses.replace(plan(asked), reasons=())
    assert explained(bare, source, asked).reasons[0].startswith(f"Unless the hub's cache holds them, {size} of")


def test_a_download_is_foretold_for_a_model_that_is_in_no_folder(tiny_model):
    """Of a store, or to the hub's cache; a folder, the built-in model and random weights have none."""

    def told(**fields):
        return [reason for reason in plan(recipe(**fields, host_mem="64G")).reasons if "downloaded" in reason]

    assert told(model="llama-70b", gpu="rtx4090") == [
        "Unless the hub's cache holds them, 131 GiB of weights are downloaded for that store, file by file, and no file"
        " is kept."
    ]
    assert told(model="llama-3.1-8b", gpu="rtx4090") == [
        "Unless the hub's cache holds them, 15.0 GiB of weights are downloaded to it."
    ]
    local = {"gpu_mem": 2**33, "fit": "stream"}
    assert not told(model=str(tiny_model()), **local) and not told(model="tiny", **local)
    assert not told(model="llama-70b", gpu="rtx4090", weights="synthetic")
