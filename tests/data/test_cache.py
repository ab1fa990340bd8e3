from pathlib import Path

import numpy as np
import pytest

from effitrain.data.cache import default_cache_dir, load_set, save_set

ARRAYS = {"a": np.arange(5, dtype=np.int32), "b": np.array([], np.int64)}
FACTS = {"format": "text", "share": 0.1, "preview": "«é»"}


def test_what_is_saved_is_read_back(tmp_path):
    save_set(tmp_path / "deep" / "key", ARRAYS, FACTS)
    arrays, facts = load_set(tmp_path / "deep" / "key")
    assert facts == FACTS
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype
        assert arrays[name].tolist() == array.tolist()


def test_nothing_saved(tmp_path):
    assert load_set(tmp_path / "key") is None


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: flip(folder / "tokens.safetensors", -1),
        lambda folder: flip(folder / "tokens.safetensors", 20),
        lambda folder: (folder / "tokens.safetensors").write_bytes(b""),
        lambda folder: (folder / "tokens.safetensors").unlink(),
        lambda folder: (folder / "set.json").unlink(),
        lambda folder: (folder / "set.json").write_text("{"),
        lambda folder: (folder / "set.json").write_text("[1]"),
        lambda folder: (folder / "set.json").write_text("{}"),
        lambda folder: (folder / "set.json").write_bytes(b"\xff"),
        lambda folder: (folder / "set.json").write_text((folder / "set.json").read_text().replace("0.1", "0.9")),
    ],
)
def test_a_harmed_set_counts_as_none_and_is_replaced(tmp_path, harm):
    folder = tmp_path / "key"
    save_set(folder, ARRAYS, FACTS)
    harm(folder)
    assert load_set(folder) is None
    save_set(folder, ARRAYS, FACTS)
    assert load_set(folder)[1] == FACTS


def test_a_place_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    save_set(tmp_path / "file" / "key", ARRAYS, FACTS)
    save_set(tmp_path / "file", ARRAYS, FACTS)
    assert (tmp_path / "file").read_text() == "in the way"


def test_the_default_place(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert default_cache_dir() == Path("/caches/effitrain/tokenized")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/someone")
    assert default_cache_dir() == Path("/someone/.cache/effitrain/tokenized")
