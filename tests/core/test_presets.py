from pathlib import Path

import pytest

from effitrain.core import presets
from effitrain.core.presets import find_preset, preset_names
from effitrain.core.spec import spec_from_config

# Elements of the published safetensors files; the last column is the size of the matrices of the decoder linears.
PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.3-70b": 70_553_706_496,
    "mistral-7b": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_config_has_the_published_number_of_parameters(name: str) -> None:
    preset = find_preset(name)
    assert preset is not None and preset.name == name
    assert spec_from_config(preset.config, name).params == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_builds_the_model_from_the_config(name: str) -> None:
    from transformers import AutoConfig

    preset = find_preset(name)
    assert preset is not None and preset.hub_id is not None and "/" in preset.hub_id
    config = AutoConfig.for_model(**preset.config)
    spec = spec_from_config(preset.config, name)
    assert (config.hidden_size, config.num_hidden_layers, config.tie_word_embeddings) == (
        spec.hidden,
        spec.num_layers,
        spec.tied,
    )
    assert config.rope_parameters["rope_theta"] == preset.config["rope_theta"]
    assert config.architectures[0].lower().startswith(spec.family)


def test_every_preset_is_listed_here_or_built_in() -> None:
    listed = {preset.name for preset in map(find_preset, preset_names()) if preset and preset.folder is None}
    assert listed == set(PUBLISHED)


def test_aliases_and_case() -> None:
    for alias, name in {"llama-70b": "llama-3.1-70b", "llama-405b": "llama-3.1-405b", "Qwen3-8B": "qwen3-8b"}.items():
        preset = find_preset(alias)
        assert preset is not None and preset.name == name
    assert {"llama-70b", "llama-3.1-70b"} <= set(preset_names())
    assert preset_names() == sorted(preset_names())


@pytest.mark.parametrize("name", ["", "llama", "llama-3.1-70b.toml", "../llama-2-7b", "meta-llama/Llama-3.1-8B"])
def test_anything_else_is_no_preset(name: str) -> None:
    assert find_preset(name) is None


def test_only_the_llamas_are_gated() -> None:
    gated = {preset.name for preset in map(find_preset, preset_names()) if preset and preset.gated}
    assert gated == {name for name in PUBLISHED if name.startswith("llama")}


def test_a_caller_who_changes_a_config_changes_only_his_own() -> None:
    first = find_preset("llama-3.1-8b")
    assert first is not None
    first.config["rope_scaling"]["factor"] = 99.0
    second = find_preset("llama-3.1-8b")
    assert second is not None and second.config["rope_scaling"]["factor"] == 8.0


def test_a_built_in_model_names_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small.toml").write_text('name = "small"\nfolder = "weights"\n[config]\nmodel_type = "llama"\n')
    monkeypatch.setattr(presets, "_FOLDER", tmp_path)
    preset = find_preset("small")
    assert preset is not None
    assert (preset.folder, preset.hub_id, preset.gated, preset.aliases) == (tmp_path / "weights", None, False, ())
    assert preset.config == {"model_type": "llama"} and preset_names() == ["small"]
