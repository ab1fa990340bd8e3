"""Tokenizers come from the model's folder, without code of their own."""

import json
import shutil

import pytest

from effitrain.core.errors import InputError
from effitrain.core.presets import find_preset
from effitrain.io.hub import ModelSource, find_model
from effitrain.io.tokenizer import load_tokenizer


@pytest.fixture
def source(tiny_model, tmp_path):
    """A model folder that a test may change."""
    shutil.copytree(tiny_model("llama"), tmp_path / "m")
    return find_model(str(tmp_path / "m"))


def test_round_trip(source):
    tokenizer = load_tokenizer(source)
    assert tokenizer.is_fast and tokenizer.eos_token == "</s>"
    assert tokenizer.decode(tokenizer("Ein Satz.")["input_ids"]) == "Ein Satz."


def test_none(source):
    for path in source.folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(InputError, match=r"has no tokenizer.json; on disk: config.json, .*\n.*Put the tokenizer.json"):
        load_tokenizer(source)


@pytest.mark.parametrize("text", ["{", "{}"])
def test_damaged(source, text):
    (source.folder / "tokenizer.json").write_text(text)
    with pytest.raises(InputError, match="cannot be loaded"):
        load_tokenizer(source)


def test_sentencepiece_file_alone(source):
    (source.folder / "tokenizer.json").unlink()
    (source.folder / "tokenizer.model").write_bytes(b"\x0a\x0e")
    with pytest.raises(InputError, match=r"has no tokenizer.json.*sentencepiece"):
        load_tokenizer(source)


def test_code_of_its_own_is_never_run(source, tmp_path):
    (source.folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass T: pass\n")
    path = source.folder / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), "tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["own.T", "own.T"]}}
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match="brings code of its own"):
        load_tokenizer(source)
    assert not (tmp_path / "ran").exists()


def test_built_in_one_stands_in_for_files_not_at_hand():
    tiny = find_preset("tiny")
    if tiny is None or tiny.folder is None or not (tiny.folder / "tokenizer.json").is_file():
        pytest.skip("the built-in tiny model is not there yet")
    tokenizer = load_tokenizer(ModelSource("llama-70b", None, {}, find_preset("llama-70b")))
    assert tokenizer.get_vocab() == load_tokenizer(find_model("tiny")).get_vocab()


@pytest.mark.parametrize("name", ["stories260K", "stories3M", "tinystories656K", "babyllama105"])
def test_real_tokenizers(name, data_dir):
    tokenizer = load_tokenizer(find_model(str(data_dir / "models" / name)))
    text = "the cat sat"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).strip() == text
