"""Files and folders appear whole or not at all."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from effitrain.core.errors import InputError
from effitrain.io import atomic
from effitrain.io.atomic import atomic_folder, remove_folder, remove_stale, write_json, write_safetensors, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_text_is_replaced_and_nothing_else_is_left(tmp_path):
    target = tmp_path / "new" / "note.txt"
    write_text(target, "eins")
    write_text(target, "zwei ü")
    assert target.read_text(encoding="utf-8") == "zwei ü"
    assert names(target.parent) == ["note.txt"]


def test_json_is_indented_and_ends_a_line(tmp_path):
    write_json(tmp_path / "a.json", {"ä": [1]})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "ä": [\n    1\n  ]\n}\n'


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", object())
    assert (tmp_path / "a.json").read_text() == "1\n"


def test_safetensors_round_trip_readable_as_other_files(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", {"x": torch.arange(3)}, {"format": "pt"})
    assert torch.equal(load_file(tmp_path / "a.safetensors")["x"], torch.arange(3))
    write_text(tmp_path / "a.txt", "")
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "a.txt").stat().st_mode
    assert names(tmp_path) == ["a.safetensors", "a.txt"]


@pytest.mark.parametrize("write", [lambda p: write_text(p, ""), lambda p: write_safetensors(p, {}, {})])
def test_place_that_cannot_be_written(tmp_path, write):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/a cannot be written: Not a directory\.\nCheck free space"):
        write(tmp_path / "file" / "a")


def test_failing_disk_is_an_input_error_and_keeps_the_old_file(tmp_path, monkeypatch):
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_text(tmp_path / "a", "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        write_text(tmp_path / "a", "new")
    with pytest.raises(InputError, match="No space left on device"), atomic_folder(tmp_path / "b") as tmp:
        (tmp / "x").write_text("")
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_failing_safetensors_is_an_input_error(tmp_path, monkeypatch):
    import safetensors
    import safetensors.torch

    def full(*_: object) -> None:
        raise safetensors.SafetensorError("No space left")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(InputError, match="No space left"):
        write_safetensors(tmp_path / "a", {}, {})
    assert names(tmp_path) == []


def test_everything_is_flushed_before_it_gets_its_name(tmp_path, monkeypatch):
    log: list[str] = []
    sync, rename = atomic._sync, Path.rename

    monkeypatch.setattr(atomic, "_sync", lambda path: (log.append(f"sync {path.name}"), sync(path)))
    monkeypatch.setattr(Path, "rename", lambda self, to: (log.append("rename"), rename(self, to))[1])
    with atomic_folder(tmp_path / "out") as tmp:
        (tmp / "sub").mkdir()
        (tmp / "sub" / "file").write_text("x")
    assert set(log[: log.index("rename")]) == {"sync file", "sync sub", f"sync {tmp.name}"}
    assert log[log.index("rename") + 1 :] == [f"sync {tmp_path.name}"]


def test_folder_is_replaced_as_a_whole(tmp_path):
    for content in ("a", "b"):
        with atomic_folder(tmp_path / "out") as tmp:
            (tmp / content).write_text("")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["b"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, FileNotFoundError])
def test_failed_folder_leaves_the_old_one(tmp_path, error):
    with atomic_folder(tmp_path / "out") as tmp:
        (tmp / "a").write_text("")
    with pytest.raises(error), atomic_folder(tmp_path / "out") as tmp:
        (tmp / "b").write_text("")
        raise error
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["a"]


def test_folder_where_a_file_is(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(InputError, match="out cannot be written: Not a directory"), atomic_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out").read_text() == "mine" and names(tmp_path) == ["out"]


@pytest.mark.parametrize("write", [atomic.write_text, lambda path, text: atomic.write_bytes(path, text.encode())])
def test_a_full_disk_within_a_folder_names_the_folder_that_is_wanted(tmp_path, monkeypatch, write):
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(atomic, "_sync", full)
    with pytest.raises(InputError) as caught, atomic_folder(tmp_path / "step-7") as tmp:
        write(tmp / "state.json", "{}")
    assert caught.value.fact == f"{tmp_path}/step-7/state.json cannot be written: full."
    assert "Check free space" in caught.value.next_step and names(tmp_path) == []


def test_folder_that_cannot_take_its_place_leaves_the_old_one(tmp_path, monkeypatch):
    rename = Path.rename

    def fail_for_new(self: Path, target: Path) -> Path:
        if ".tmp-" in self.name:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return rename(self, target)

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("")
    monkeypatch.setattr(Path, "rename", fail_for_new)
    with pytest.raises(InputError, match="out cannot be written: Permission denied"), atomic_folder(tmp_path / "out"):
        pass
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["old"]


def test_removed_folder_is_gone(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    remove_folder(tmp_path / "a")
    assert names(tmp_path) == []


def test_stale_writers_are_cleared_and_nothing_else(tmp_path):
    kept = ["step-1", ".cache", ".mine.tmp-x", ".gitignore.replacedx"]
    for name in (*kept, ".a.tmp-0123abcd", ".step-9.removed-0123abcd", ".step-1.replaced"):
        (tmp_path / name).mkdir()
    remove_stale(tmp_path)
    assert names(tmp_path) == sorted(kept)


def test_folder_caught_between_two_names_comes_back(tmp_path):
    (tmp_path / ".adapter.replaced").mkdir()
    (tmp_path / ".adapter.replaced" / "old").write_text("")
    remove_stale(tmp_path)
    assert names(tmp_path) == ["adapter"] and names(tmp_path / "adapter") == ["old"]


WRITER = """
import sys, itertools
from pathlib import Path
from effitrain.io.atomic import atomic_folder, write_text
for n in itertools.count():
    write_text(Path(sys.argv[1]) / "file", f"{n:06d}" * 1000)
    with atomic_folder(Path(sys.argv[1]) / "folder") as tmp:
        for part in range(3):
            (tmp / str(part)).write_text(f"{n:06d}" * 1000)
    print(n, flush=True)
"""


def test_kill_at_any_moment_leaves_whole_things(tmp_path):
    for trial in range(4):
        process = subprocess.Popen([sys.executable, "-c", WRITER, tmp_path], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline()
        time.sleep(0.0037 * trial)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        remove_stale(tmp_path)
        assert names(tmp_path) == ["file", "folder"] and names(tmp_path / "folder") == ["0", "1", "2"]
        assert is_whole([tmp_path / "file"]) and is_whole(list((tmp_path / "folder").iterdir()))


def is_whole(files: list[Path]) -> bool:
    texts = {file.read_text() for file in files}
    return len(texts) == 1 and texts.pop() in {f"{n:06d}" * 1000 for n in range(10_000)}
