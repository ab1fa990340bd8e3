"""Damage to a folder with a manifest is found, and the file named."""

import json

import pytest

from effitrain.core.errors import InputError
from effitrain.io.manifest import verify_manifest, write_manifest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.bin").write_bytes(b"abc")
    (tmp_path / "sub" / "b.bin").write_bytes(b"")
    write_manifest(tmp_path)
    return tmp_path


def test_lists_every_file_but_itself(folder):
    write_manifest(folder)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert list(files) == ["a.bin", "sub/b.bin"]
    # echo -n abc | sha256sum
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files["a.bin"] == {"size": 3, "sha256": digest}


def test_whole_folder_passes_with_files_of_others_in_it(folder):
    (folder / "other").write_text("")
    verify_manifest(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "a.bin").write_bytes(b"abd"), "a.bin has changed"),
        (lambda f: (f / "a.bin").write_bytes(b"ab"), "a.bin has 2 bytes instead of 3"),
        (lambda f: (f / "sub" / "b.bin").unlink(), "sub/b.bin is missing"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
        (lambda f: (f / "manifest.json").write_text('{"files": {"a": 1}}'), "manifest.json cannot be read"),
    ],
)
def test_damage_is_named(folder, damage, message):
    damage(folder)
    with pytest.raises(InputError, match=message):
        verify_manifest(folder)
