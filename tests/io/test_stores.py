"""Stores tell from which commit of the hub they are, and so pin it: offline, and whatever is pushed meanwhile."""

import json
import os
from pathlib import Path

import pytest

from effitrain.core.errors import InputError
from effitrain.io import hub
from effitrain.io.hub import ModelSource, check_weights, find_model, revision_of
from effitrain.io.stores import default_store_dir, is_stored, list_stores, origin_of, pinned_commit

OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def put(tmp_path, monkeypatch):
    """``put(folder, origin, age)``: a store of that origin, made ``age`` seconds ago."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def make(name: str, origin: str | None, age: int = 0) -> Path:
        path = default_store_dir() / name / "store.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"key": {} if origin is None else {"origin": origin}}))
        os.utime(path, (1e9 - age, 1e9 - age))
        return path.parent

    return make


def test_the_newest_store_pins_its_commit(put):
    put("other", f"someone/other@{NEW}")
    put("from-a-folder", "")
    put("of-an-old-version", None)
    assert pinned_commit(default_store_dir(), "someone/model") is None
    put("first", f"someone/model@{OLD}", age=9)
    assert pinned_commit(default_store_dir(), "someone/model") == OLD
    put("second.partial", f"someone/model@{NEW}")
    root = default_store_dir()
    assert pinned_commit(root, "someone/model") == NEW  # a builder that was killed goes on with what it began
    assert is_stored(root, "someone/model", OLD) and not is_stored(root, "someone/model", NEW)
    assert [origin_of(folder) for folder in list_stores(root)].count("") == 2


def test_a_damaged_store_pins_nothing(put):
    (put("broken", "x") / "store.json").write_text("{")
    assert pinned_commit(default_store_dir(), "someone/model") is None


def test_a_finished_store_needs_no_network(put, monkeypatch):
    def offline(*_: object) -> None:
        raise InputError("offline")

    monkeypatch.setattr(hub, "_ask_hub", offline)
    monkeypatch.setattr(hub, "_cached", lambda source: None)
    preset = find_model("llama-70b")
    with pytest.raises(InputError, match="offline"):
        check_weights(preset)
    put("store", f"{preset.hub_id}@{OLD}")
    pinned = find_model("llama-70b")
    check_weights(pinned)
    assert revision_of(pinned) == OLD and pinned.hub_id == preset.hub_id
    with pytest.raises(InputError, match="offline"):  # who names another revision means it
        check_weights(ModelSource(f"{preset.hub_id}@v2", None, {}, None, "v2"))
