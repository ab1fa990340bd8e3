"""A model's name means a preset, a folder or a hub id; what cannot be had ends in one message that says what to do."""

import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from effitrain.core.errors import InputError
from effitrain.core.presets import find_preset
from effitrain.io.hub import ModelSource, check_weights, fetch_weights, find_model, revision_of

ID = "someone/a-model"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty hub cache."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put_in_cache(cache, hub_id, folder):
    """What a finished download of ``folder`` leaves."""
    repo = cache / f"models--{hub_id.replace('/', '--')}"
    shutil.copytree(folder, repo / "snapshots" / ("0" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    return repo / "snapshots" / ("0" * 40)


def hub_says(monkeypatch, error):
    """Make the hub answer every question with ``error``."""
    import huggingface_hub

    def fail(*_: object, local_files_only: bool = False, **__: object) -> None:
        raise huggingface_hub.errors.LocalEntryNotFoundError("not cached") if local_files_only else error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", fail)


def message_of(call, *arguments) -> str:
    with pytest.raises(InputError) as error:
        call(*arguments)
    return str(error.value)


@pytest.mark.parametrize(("name", "canonical"), [("llama-70b", "llama-3.1-70b"), ("Mistral-7B", "mistral-7b")])
def test_preset(name, canonical):
    source = find_model(name)
    assert source.preset is not None and source.preset == find_preset(canonical)
    assert source.name == name and source.folder is None and source.config == source.preset.config
    assert source.hub_id == source.preset.hub_id


def test_folder(tiny_model, monkeypatch):
    folder = tiny_model("llama")
    for name in (str(folder), f"{folder}/"):
        source = find_model(name)
        assert source.folder == folder and source.preset is None and source.config["model_type"] == "llama"
        assert fetch_weights(source) == folder
    monkeypatch.chdir(folder.parent)
    assert find_model(folder.name).folder is not None and find_model(f"./{folder.name}").folder is not None
    monkeypatch.setenv("HOME", str(folder.parent))
    assert find_model(f"~/{folder.name}").folder == folder


def test_preset_comes_before_a_folder_of_that_name(tiny_model, tmp_path, monkeypatch):
    shutil.copytree(tiny_model("llama"), tmp_path / "mistral-7b")
    monkeypatch.chdir(tmp_path)
    assert find_model("mistral-7b").preset is not None
    assert find_model("./mistral-7b").preset is None


@pytest.mark.parametrize("name", ["./x", "/no/such", "x/", "a/b/c", "~/no-such", "../x"])
def test_path_that_leads_nowhere(name):
    assert "There is no folder" in message_of(find_model, name)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("llama-70", "llama-70b"), ("mistral7b", "mistral-7b"), ("Qwen2.5-7", "qwen2.5-7b"), ("xyzzy", None), ("", None)],
)
def test_unknown_name(name, nearest):
    message = message_of(find_model, name)
    assert f"no preset and no folder {name!r}" in message and "owner/name" in message and "llama-3.1-8b" in message
    assert (f"Did you mean {nearest!r}" in message) if nearest else ("Did you mean" not in message)


def test_file_in_the_place_of_a_folder(tiny_model):
    assert "is a file, not a model folder" in message_of(find_model, str(tiny_model("llama") / "model.safetensors"))


def test_damaged_local_weights_are_found_by_the_check(tiny_model, tmp_path):
    shutil.copytree(tiny_model("llama"), tmp_path, dirs_exist_ok=True)
    source = find_model(str(tmp_path))
    check_weights(source)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "cut off" in message_of(check_weights, source)
    assert "cut off" in message_of(fetch_weights, source)


def test_what_the_cache_holds_needs_no_network(hub_cache, tiny_model):
    cached = put_in_cache(hub_cache, ID, tiny_model("llama"))
    source = find_model(ID)
    assert source.folder is None and source.hub_id == ID and source.config["model_type"] == "llama"
    check_weights(source)
    assert fetch_weights(source) == cached


def test_cached_preset(hub_cache, tiny_model):
    source = find_model("llama-70b")
    cached = put_in_cache(hub_cache, source.hub_id, tiny_model("llama"))
    check_weights(source)
    assert fetch_weights(source) == cached


def test_what_stock_transformers_loads(hub_cache, tiny_model, monkeypatch):
    folder, tiny = tiny_model("llama"), find_preset("tiny")
    put_in_cache(hub_cache, ID, folder)
    monkeypatch.setenv("HOME", str(folder.parent))
    assert find_model("llama-2-7b").loads_from == "meta-llama/Llama-2-7b-hf"
    assert find_model(f"{ID}@main").loads_from == ID
    assert tiny is not None and find_model("tiny").loads_from == str(tiny.folder)
    assert find_model(f"~/{folder.name}").loads_from == find_model(str(folder)).loads_from == str(folder)


def test_a_revision_may_be_named(hub_cache, tiny_model):
    put_in_cache(hub_cache, ID, tiny_model("llama"))
    source = find_model(f"{ID}@{'0' * 40}")
    assert (source.hub_id, source.revision) == (ID, "0" * 40) and revision_of(source) == "0" * 40
    check_weights(source)
    assert find_model(f"{ID}@main").hub_id == ID
    message_of(find_model, f"{ID}@{'1' * 40}")


def test_config_in_the_cache_without_weights(hub_cache, tiny_model):
    cached = put_in_cache(hub_cache, ID, tiny_model("llama"))
    (cached / "model.safetensors").unlink()
    source = find_model(ID)
    for call in (check_weights, fetch_weights):
        message_of(call, source)


def test_offline_says_how_to_go_on(hub_cache):
    source = find_model("llama-70b")
    for call in (check_weights, fetch_weights):
        message = message_of(call, source)
        assert f"{source.hub_id} is not in the hub cache. HF_HUB_OFFLINE forbids to download it." in message
        for help in ("licence", "`hf auth login`", "--model FOLDER", "--model llama-70b --weights synthetic"):
            assert help in message
    message = message_of(find_model, ID)
    assert "HF_HUB_OFFLINE" in message and f"If {ID} is a folder" in message and "--weights synthetic" in message


def answers():
    from huggingface_hub import errors

    reply = SimpleNamespace(headers={}, request=None)
    lost = errors.LocalEntryNotFoundError("cannot find the snapshot")
    lost.__cause__ = ConnectionError("Name or service not known")
    return {
        "is gated. Its owner asks": errors.GatedRepoError("x", response=reply),
        "hub has no someone/a-model, and there is no folder": errors.RepositoryNotFoundError("x", response=reply),
        "cannot be had from the hub: 502 Bad Gateway": errors.HfHubHTTPError("502 Bad Gateway\nx", response=reply),
        "it is no hub id: Repo id must": errors.HFValidationError("Repo id must ..."),
        "the hub cannot be reached (Name or service not known)": lost,
        "the hub cannot be reached (Timeout)": TimeoutError("Timeout"),
        "cannot be written to the hub cache: No space left": OSError(28, "No space left on device"),
    }


@pytest.mark.parametrize("expected", [*answers()])
def test_errors_of_the_hub_are_translated(expected, monkeypatch):
    hub_says(monkeypatch, answers()[expected])
    source = ModelSource(ID, None, {}, None)
    for call in (check_weights, fetch_weights):
        message = message_of(call, source)
        assert expected in message and f"--model {ID} --weights synthetic" in message
    assert expected in message_of(find_model, ID)


def test_only_safetensors_and_small_files_are_asked_for(monkeypatch, tiny_model):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked = []

    def download(_: str, allow_patterns: list[str], local_files_only: bool = False, **__: object) -> str:
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("")
        asked.append(allow_patterns)
        return str(tiny_model("llama"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert fetch_weights(find_model(ID)) == tiny_model("llama")
    repo = ["config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt"]
    repo += ["special_tokens_map.json", "chat_template.jinja", "generation_config.json", "model.safetensors"]
    repo += ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "modeling_x.py"]
    repo += ["consolidated.safetensors", "original/consolidated.00.pth", "original/params.json", "x.gguf", "README.md"]
    small, everything = (list(filter_repo_objects(repo, allow_patterns=patterns)) for patterns in asked)
    assert small == repo[:9] and everything == repo[:12]


def test_without_network_it_ends_in_seconds(tmp_path):
    """A real attempt, at an address that refuses connections."""
    code = (
        "import sys\nfrom effitrain.core.errors import InputError\nfrom effitrain.io import hub\n"
        "for call in (lambda: hub.find_model('someone/x'), lambda: hub.check_weights(hub.find_model('llama-70b')),"
        " lambda: hub.fetch_weights(hub.find_model('llama-70b'))):\n"
        "    try: call(); sys.exit('no error')\n"
        "    except InputError as error: assert 'the hub cannot be reached' in str(error), error\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 10
