"""What a model folder holds is read from headers; everything that can be wrong with one has its own message."""

import json
import time

import pytest
import torch
from safetensors.torch import save_file

from effitrain.core.errors import InputError
from effitrain.io.model_folder import read_config, read_header, stored_tensors


@pytest.fixture
def folder(tmp_path):
    """A model in two shards."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": torch.arange(6.0).view(2, 3)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(4, dtype=torch.bfloat16), "c": torch.tensor(7)}, tmp_path / "two.safetensors")
    write_index(tmp_path, a="one.safetensors", b="two.safetensors", c="two.safetensors")
    return tmp_path


def write_index(folder, **files):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def test_shards_are_listed_with_their_places(folder):
    tensors = stored_tensors(folder)
    assert list(tensors) == ["a", "b", "c"]
    assert [(t.dtype, t.shape, t.nbytes) for t in tensors.values()] == [
        ("F32", (2, 3), 24),
        ("BF16", (4,), 8),
        ("I64", (), 8),
    ]
    place = tensors["a"]
    data = place.file.read_bytes()[place.start : place.start + place.nbytes]
    assert torch.frombuffer(bytearray(data), dtype=torch.float32).tolist() == [0, 1, 2, 3, 4, 5]


def test_single_file_comes_before_an_index(folder):
    save_file({"x": torch.zeros(0, 3)}, folder / "model.safetensors")
    assert [t.shape for t in stored_tensors(folder).values()] == [(0, 3)]


def test_only_headers_are_read(tmp_path):
    """176 GB in 30 shards, as holes on the disk: opened at once, no data touched."""
    size = 176 * 10**9 // 30 // 2 * 2
    files = {f"w{n}": f"model-{n:05d}-of-00030.safetensors" for n in range(30)}
    for tensor, name in files.items():
        header = json.dumps({tensor: {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}}).encode()
        with (tmp_path / name).open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + size)
    write_index(tmp_path, **files)
    start = time.monotonic()
    assert sum(tensor.nbytes for tensor in stored_tensors(tmp_path).values()) == 30 * size
    assert time.monotonic() - start < 2


def fails(folder, message: str) -> str:
    with pytest.raises(InputError, match=message) as error:
        read_config(folder)
        stored_tensors(folder)
    assert error.value.next_step
    return str(error.value)


def test_missing_folder(tmp_path):
    fails(tmp_path / "none", "There is no folder .*none")


def test_file_in_the_place_of_a_folder(folder):
    fails(folder / "one.safetensors", "one.safetensors is a file, not a model folder")


def test_folder_without_config(folder):
    (folder / "config.json").unlink()
    assert "on disk: model.safetensors.index.json, one.safetensors, two" in fails(folder, "config.json is missing")


def test_adapter_in_the_place_of_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "base model" in fails(tmp_path, "holds an adapter, not a model")


@pytest.mark.parametrize("text", ["{", "[1]", "\x80"])
def test_broken_config(folder, text):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    fails(folder, "config.json (is damaged|does not hold a JSON object)")


def test_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert "on disk: config.json." in fails(tmp_path, "neither model.safetensors nor model.safetensors.index.json")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_pickle_only(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"\x80\x02")
    assert "safetensors version" in fails(tmp_path, f"as pickle \\({name}\\)")


def test_missing_shard(folder):
    (folder / "two.safetensors").unlink()
    message = fails(folder, "1 of 2 shards are missing in .*: two.safetensors; on disk: config.json, ")
    assert "one.safetensors." in message


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "{}"])
def test_broken_index(folder, text):
    (folder / "model.safetensors.index.json").write_text(text)
    fails(folder, "index.json (is damaged|has no weight_map|does not hold)")


def test_index_of_another_model(folder):
    write_index(folder, a="one.safetensors", z="two.safetensors")
    fails(folder, "lists 1 tensors that are not in their files: z")


@pytest.mark.parametrize("keep", [0, 4, 8, 20, -1])
def test_truncated_file(folder, keep):
    data = (folder / "two.safetensors").read_bytes()
    (folder / "two.safetensors").write_bytes(data[:keep])
    message = fails(folder, "two.safetensors (is not a safetensors file|has)")
    assert "cut off" in message or "empty" in message


def test_truncated_in_the_data_says_the_numbers(folder):
    data = (folder / "one.safetensors").read_bytes()
    (folder / "one.safetensors").write_bytes(data[:-5])
    fails(folder, f"has {len(data) - 5} bytes .* speaks of {len(data)} .*cut off")


def test_trailing_bytes(folder):
    with (folder / "one.safetensors").open("ab") as file:
        file.write(b"more")
    fails(folder, "Something was written behind its end")


@pytest.mark.parametrize(
    ("content", "guess"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5\n", "Git LFS pointer"),
        (b"\n<!DOCTYPE html><html></html>", "web page"),
        (b"<html>", "web page"),
        (b"PK\x03\x04" + bytes(100), "pickle under another name"),
        (b"\x80\x02}q\x00." + bytes(100), "pickle under another name"),
        (b"GGUF\x03" + bytes(100), "damaged"),
        (bytes(100), "damaged"),
    ],
)
def test_something_else_under_the_name(folder, content, guess):
    (folder / "one.safetensors").write_bytes(content)
    assert guess in fails(folder, "one.safetensors is not a safetensors file")


@pytest.mark.parametrize(
    "header",
    [
        [1],
        {"a": 1},
        {"a": {"dtype": "F32", "shape": [2]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}},
        {"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, "8"]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0.0, 8.0]}},
        {"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 8]}},
    ],
)
def test_damaged_header(tmp_path, header):
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(InputError, match="not a safetensors file"):
        read_header(path)


def test_needs_no_torch():
    import subprocess
    import sys

    code = "import effitrain.io.hub, effitrain.io.atomic, effitrain.io.manifest, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
