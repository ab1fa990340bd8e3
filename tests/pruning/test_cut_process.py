"""Cutting in a process of its own: how much memory it takes, and what a kill leaves."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

CUT = """
import os, resource, signal, sys
from pathlib import Path
import torch
from effitrain.core.cut import cut_widths
from effitrain.core.keep import KeepMap, LayerKeep
from effitrain.core.presets import find_preset
from effitrain.core.spec import spec_from_config
from effitrain.io.atomic import remove_stale
from effitrain.io.synthetic import SyntheticCheckpoint, shapes_of
from effitrain.pruning.cut import CutWeights, write_cut
from effitrain.quant.nf4 import quantize, warm_up

name, layers, vocab, stop, form, target = *sys.argv[1:6], Path(sys.argv[6])
layers, vocab = int(layers), int(vocab)
config = {**find_preset(name).config, "num_hidden_layers": layers, "vocab_size": vocab}
spec = spec_from_config(config, name)
widths = cut_widths(spec, 0.5, exempt=(0, 0))
keep = KeepMap.of(spec, [LayerKeep(tuple(range(w.ffn)), tuple(range(w.kv_heads))) for w in widths], name, "")
weights = SyntheticCheckpoint(shapes_of(spec), 0, False, torch.bfloat16)

def progress(tensor):
    if tensor == stop:
        os.kill(os.getpid(), signal.SIGKILL)

warm_up(torch.device("cpu"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
remove_stale(target.parent, target.name)
write_cut(target, CutWeights(weights, spec, keep), config, None, progress=progress,
          quantize=quantize if form == "nf4" else None)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def cut(
    name: str, layers: int, vocab: int, target: Path, stop: str = "none", form: str = "nf4"
) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-P", "-c", CUT, name, str(layers), str(vocab), stop, form, str(target)]
    return subprocess.run(arguments, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("layers", "vocab", "most"),
    [
        (1, 2048, 0.4),  # the largest tensor, 2,048 x 8,192 in bfloat16, is 32 MiB
        pytest.param(16, 128256, 1.5, marks=[pytest.mark.slow, pytest.mark.timeout(900)]),  # the embedding is 0.49 GiB
    ],
)
@pytest.mark.parametrize("form", ["none", "nf4"])
def test_cutting_the_1b_shape_takes_the_memory_of_a_few_tensors(layers, vocab, most, form, tmp_path):
    """``most`` GiB of resident memory above what the process has after its imports."""
    done = cut("llama-3.2-1b", layers, vocab, tmp_path / "small", form=form)
    assert done.returncode == 0, done.stderr
    print(f"{layers} layers, {form}: {int(done.stdout) / 1024:.0f} MiB")
    assert int(done.stdout) < most * 2**20  # KiB


def test_a_kill_leaves_nothing_under_the_targets_name_and_the_next_cut_cleans_up(tmp_path):
    target = tmp_path / "small"
    killed = cut("tiny", 3, 64, target, stop="model.layers.1.mlp.up_proj.weight")
    assert killed.returncode == -signal.SIGKILL and not target.exists()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".small.tmp-")
    assert cut("tiny", 3, 64, target).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    assert sorted(path.name for path in target.iterdir()) == [
        "config.json", "keep.safetensors", "model.safetensors", "prune.json",
    ]  # fmt: skip
