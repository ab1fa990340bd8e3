"""Building a store: from shards and from NF4 checkpoints, within memory, past kills, and never half."""

import hashlib
import json
import multiprocessing
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from effitrain.core.errors import InputError
from effitrain.core.presets import find_preset
from effitrain.core.recipe import make_recipe
from effitrain.core.spec import spec_from_config
from effitrain.io import store as store_module
from effitrain.io.checkpoint import open_checkpoint
from effitrain.io.disk import folder_bytes
from effitrain.io.store import StoreKey, verify_store
from effitrain.io.stores import list_stores
from effitrain.io.synthetic import SyntheticCheckpoint, shapes_of
from effitrain.io.writer import stream_safetensors
from effitrain.planning import plan
from effitrain.stream.build import ensure_store

MIB = 2**20


def write_checkpoint(folder: Path, config: dict, shards: int, dtype=torch.bfloat16):
    """A random sharded checkpoint of the shape of ``config``."""
    spec = spec_from_config(config, "random")
    weights = SyntheticCheckpoint(shapes_of(spec), 0, False, dtype)
    names = weights.names()
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    weight_map = {}
    for number in range(shards):
        part, file = names[number::shards], f"model-{number}.safetensors"
        stream_safetensors(folder / file, {name: (dtype, weights.shape(name)) for name in part}, weights.read)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return spec


def small_config(layers=6, hidden=128, ffn=256):
    return {
        **find_preset("llama-3.2-1b").config,
        "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": ffn, "vocab_size": 500,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": hidden // 4,
    }  # fmt: skip


def key_of(checkpoint, dtype="fp32"):
    return StoreKey("random", checkpoint.fingerprint(), "nf4", dtype)


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def build_in(root: Path, folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    ensure_store(root, key_of(checkpoint), spec_from_config(config, "random"), checkpoint)


def started(root: Path, folder: Path) -> multiprocessing.Process:
    """A builder in a process of its own, which may be killed."""
    builder = multiprocessing.get_context("fork").Process(target=build_in, args=(root, folder))
    builder.start()
    return builder


MEASURE = """
import json, sys, threading
from pathlib import Path
import torch
from effitrain.core.spec import spec_from_config
from effitrain.io.checkpoint import open_checkpoint
from effitrain.io.store import StoreKey
from effitrain.quant.nf4 import quantize
from effitrain.stream.build import ensure_store

def anonymous():
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(lines["RssAnon"].split()[0]) * 1024

def watch():
    while not done.wait(0.001):
        peaks.append(max(peaks.pop(), anonymous()))

root, folder, dtype = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
quantize(torch.zeros(64, 64))
before, done = anonymous(), threading.Event()
peaks = [before]
watcher = threading.Thread(target=watch)
watcher.start()
checkpoint = open_checkpoint(folder)
spec = spec_from_config(json.loads((folder / "config.json").read_text()), "random")
ensure_store(root, StoreKey("random", "x", "nf4", dtype), spec, checkpoint)
done.set()
watcher.join()
print(peaks[0] - before)
"""


def grown_bytes(root: Path, folder: Path, dtype: str) -> int:
    """By how much building makes the anonymous memory of a process grow that has imported torch."""
    command = [sys.executable, "-P", "-c", MEASURE, str(root), str(folder), dtype]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=900).stdout)


def test_progress_and_going_on(tmp_path):
    spec = write_checkpoint(tmp_path / "model", small_config(), 3)
    checkpoint = open_checkpoint(tmp_path / "model")
    told = []

    def stop_after_four(done, parts):
        told.append((done, parts))
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_store(tmp_path / "a", key_of(checkpoint), spec, checkpoint, stop_after_four)
    assert told == [(n, 8) for n in range(1, 5)]
    (partial,) = list_stores(tmp_path / "a")
    assert partial.name.endswith(".partial") and len(list((partial / "layers").glob("*.bin"))) == 3
    before = {path: path.stat().st_mtime_ns for path in (partial / "layers").iterdir()}
    store = ensure_store(tmp_path / "a", key_of(checkpoint), spec, checkpoint)
    assert all((store.folder / "layers" / path.name).stat().st_mtime_ns == time for path, time in before.items())
    other = ensure_store(tmp_path / "b", key_of(checkpoint), spec, checkpoint)
    assert digests(store.folder) == digests(other.folder)
    assert [path.name for path in (tmp_path / "a").iterdir()] == [store.folder.name]


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_kill_9_at_any_moment_costs_nothing(tmp_path, kills):
    write_checkpoint(tmp_path / "model", small_config(layers=12, hidden=512, ffn=1024), 2)
    build_in(tmp_path / "whole", tmp_path / "model")
    rng = random.Random(kills)
    for layers in sorted(rng.randrange(10) for _ in range(kills)):
        victim, deadline = started(tmp_path / "killed", tmp_path / "model"), time.monotonic() + 60
        while len(list((tmp_path / "killed").glob("*/layers/*.bin"))) < layers:
            assert time.monotonic() < deadline and victim.is_alive()
            time.sleep(0.001)
        time.sleep(0.02 * rng.random())
        victim.kill()
        victim.join()
        assert victim.exitcode == -9
        assert all(path.name.endswith(".partial") for path in list_stores(tmp_path / "killed"))
    build_in(tmp_path / "killed", tmp_path / "model")
    (store,), (expected,) = list_stores(tmp_path / "killed"), list_stores(tmp_path / "whole")
    verify_store(store)
    assert digests(store) == digests(expected)
    assert [path.name for path in (tmp_path / "killed").iterdir()] == [store.name]


def test_the_plan_foretells_its_size(tmp_path):
    """Embedding and head too, as the checkpoint has them; names, sizes and hashes of the parts are on top."""
    config = {**small_config(layers=4, hidden=256, ffn=512), "vocab_size": 5000, "tie_word_embeddings": False}
    spec = write_checkpoint(tmp_path / "model", config, 2)
    checkpoint = open_checkpoint(tmp_path / "model")
    store = ensure_store(tmp_path / "stores", key_of(checkpoint), spec, checkpoint)
    asked = make_recipe({"model": str(tmp_path / "model"), "fit": "stream", "gpu_mem": 2**33, "host_mem": 2**33})
    (line,) = (line for line in plan(asked).ledger if line.where == "disk")
    assert line.what == "store"
    assert 0 < folder_bytes(store.folder) - line.bytes < 0.01 * line.bytes


def test_nf4_checkpoints_are_taken_as_they_are(data_or_made_nf4, tmp_path):
    folder, spec = data_or_made_nf4
    checkpoint = open_checkpoint(folder)
    store = ensure_store(tmp_path, key_of(checkpoint), spec, checkpoint)
    names = [name for name in checkpoint.names() if checkpoint.is_nf4(name)]
    assert len(names) == 7 * spec.num_layers
    for name in names:
        a, b = store.read_nf4(name), checkpoint.read_nf4(name)
        assert torch.equal(a.packed, b.packed) and torch.equal(a.absmax, b.absmax)
        assert torch.equal(a.nested_absmax, b.nested_absmax) and torch.equal(a.offset, b.offset)


@pytest.fixture
def data_or_made_nf4(tiny_model, tmp_path):
    """A checkpoint in bitsandbytes' NF4, saved tensor by tensor in its layout."""
    from safetensors.torch import save_file

    from effitrain.model.load import find_base
    from effitrain.quant.nf4 import quantize

    base = find_base(str(tiny_model("llama")))
    checkpoint, tensors = open_checkpoint(base.source.folder), {}
    for name in checkpoint.names():
        full = checkpoint.read(name)
        is_linear = name.endswith("_proj.weight")
        tensors |= quantize(full).to_state(name, full.dtype) if is_linear else {name: full}
    folder = tmp_path / "nf4"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    quantisation = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
                    "bnb_4bit_use_double_quant": True}  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**base.source.config, "quantization_config": quantisation}))
    return folder, base.spec


def test_too_little_space_is_told_before_anything_is_written(tmp_path, monkeypatch):
    spec = write_checkpoint(tmp_path / "model", small_config(), 1)
    checkpoint = open_checkpoint(tmp_path / "model")
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"takes .* more in .*9.8 KiB are free"):
        ensure_store(tmp_path / "stores", key_of(checkpoint), spec, checkpoint)
    assert not [path for path in (tmp_path / "stores").rglob("*") if path.is_file()]


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    """The disk fills up in the middle of the third layer."""
    import effitrain.io.blob as blob

    spec = write_checkpoint(tmp_path / "model", small_config(), 1)
    checkpoint = open_checkpoint(tmp_path / "model")
    parts_of, calls = blob.parts_of, []

    def full(weight):
        calls.append(weight)
        if len(calls) == 2 * 7 + 4:
            raise OSError(28, "No space left on device")
        return parts_of(weight)

    monkeypatch.setattr(blob, "parts_of", full)
    with pytest.raises(InputError, match="No space left on device") as caught:
        ensure_store(tmp_path / "stores", key_of(checkpoint), spec, checkpoint)
    assert "XDG_CACHE_HOME" in caught.value.next_step and "-o" not in caught.value.next_step
    (partial,) = list_stores(tmp_path / "stores")
    blobs = sorted((partial / "layers").glob("*.bin"))
    assert [path.name for path in blobs] == ["000.bin", "001.bin"]
    assert all(path.stat().st_size % 4096 == 0 for path in blobs)
    assert not list(partial.rglob(".*"))


def test_memory_while_building(tmp_path):
    """At most three of the largest tensors, 32 MiB in float32 each; 8 MiB are the allocator's."""
    spec = write_checkpoint(tmp_path / "model", small_config(layers=3, hidden=1024, ffn=8192), 2)
    largest = 4 * max(linear.weights for layer in spec.layers for linear in layer.linears)
    assert grown_bytes(tmp_path / "stores", tmp_path / "model", "fp32") <= 3 * largest + 8 * MIB


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_memory_while_building_a_1b_shape(tmp_path, dtype):
    write_checkpoint(tmp_path / "model", dict(find_preset("llama-3.2-1b").config), 3)
    grown = grown_bytes(tmp_path / "stores", tmp_path / "model", dtype)
    print(f"building llama-3.2-1b in {dtype}: {grown / MIB:.0f} MiB")
    assert grown <= 1536 * MIB
