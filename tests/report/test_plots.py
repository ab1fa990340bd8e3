"""The loss curve: runs of any length give a PNG that shows their points, and matplotlib keeps no state behind."""

import io
import subprocess
import sys

import pytest

from effitrain.report.plots import SMOOTHED_FROM, loss_png, positions_png, running_mean, timeline_png
from effitrain.stream.engine import Span


def metrics(count: int) -> list[dict]:
    return [{"step": n + 1, "loss": 4.0 - 0.01 * n} for n in range(count)]


@pytest.mark.parametrize("count", [0, 1, SMOOTHED_FROM - 1, SMOOTHED_FROM])
@pytest.mark.parametrize("points", [(), [(0, 4.1)]])
def test_any_run_gives_a_png(count, points):
    from PIL import Image

    image = Image.open(io.BytesIO(loss_png(metrics(count), points)))
    assert image.format == "PNG" and image.size == (1600, 800)
    colours = {colour for _, colour in image.convert("RGB").getcolors(2**20)}
    assert ((0x2A, 0x78, 0xD6) in colours) == (count > 0)
    assert ((0xD9, 0x62, 0x2B) in colours) == bool(points)


@pytest.mark.parametrize("kinds", [("compute",), ("compute", "copy"), ("compute", "copy", "wait")])
def test_a_timeline_shows_each_kind(kinds):
    from PIL import Image

    spans = [Span(kind, layer, 0.1 * layer, 0.1 * layer + 0.08) for layer in range(4) for kind in kinds]
    image = Image.open(io.BytesIO(timeline_png(spans)))
    colours = {colour for _, colour in image.convert("RGB").getcolors(2**20)}
    assert image.size == (1600, 800)
    assert ((0x2A, 0x78, 0xD6) in colours) == ("copy" in kinds) and (0xB8, 0xD4, 0xF3) in colours
    assert ((0xD9, 0x62, 0x2B) in colours) == ("wait" in kinds)


def test_same_run_same_bytes():
    assert loss_png(metrics(5), [(0, 4.0)]) == loss_png(metrics(5), [(0, 4.0)])


def test_running_mean_is_unbiased_from_the_first_value():
    assert running_mean([]) == []
    assert running_mean([5.0] * 4) == pytest.approx([5.0] * 4)
    assert running_mean([1.0, 2.0], decay=0.5) == pytest.approx([1.0, (0.25 * 1 + 0.5 * 2) / 0.75])


def test_importing_the_room_is_cheap():
    code = (
        "import sys, effitrain.report.plots, effitrain.report.html; print({'matplotlib', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_losses_by_position_give_a_png_of_both_curves():
    from PIL import Image

    buckets = [{"start": n, "end": n + 1, "before": 4.0 + n, "after": 3.0} for n in range(4)]
    image = Image.open(io.BytesIO(positions_png(buckets)))
    colours = {colour for _, colour in image.convert("RGB").getcolors(2**20)}
    assert image.size == (1600, 800) and {(0x2A, 0x78, 0xD6), (0xD9, 0x62, 0x2B)} <= colours
