"""The built-in model and its instruction set: small, whole, made by the script, and new to the model."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

PRESETS = Path(__file__).parents[2] / "effitrain" / "presets"
SCRIPTS = Path(__file__).parents[2] / "scripts"


def test_fits_in_three_megabytes():
    files = [p for folder in ("tiny", "tiny_data") for p in (PRESETS / folder).iterdir()]
    assert sum(p.stat().st_size for p in files) < 3 * 10**6


def test_script_preset_and_folder_agree(monkeypatch):
    """A script that makes another model than the one that is shipped would be found only when it is run."""
    from effitrain.core.presets import find_preset
    from effitrain.core.spec import spec_from_config

    monkeypatch.syspath_prepend(str(SCRIPTS))
    made = importlib.import_module("make_tiny").CONFIG
    preset = find_preset("tiny")
    assert preset is not None and preset.folder is not None
    stored = json.loads((preset.folder / "config.json").read_text())
    assert {key: stored[key] for key in made} == made
    assert {key: made[key] for key in preset.config} == preset.config
    spec = spec_from_config(preset.config, "tiny")
    assert 0.9e6 < spec.params < 1.3e6 and spec.num_kv_heads < spec.num_heads


def test_help_and_plan_tell_what_it_brings():
    from effitrain.core.presets import find_preset
    from effitrain.core.recipe import Recipe
    from effitrain.planning import plan, recipe

    preset = find_preset("tiny")
    assert preset is not None and preset.defaults.keys() == {"lr", "epochs"}
    for name, value in preset.defaults.items():
        numbers = re.findall(r"[\d.e-]+", str(Recipe.model_fields[name].description))
        assert value in map(float, (number.rstrip(".") for number in numbers if number[0].isdigit()))
    brings = "The preset tiny brings --lr 0.005 and --epochs 3."
    assert brings in plan(recipe(host_mem="8G")).reasons
    assert "The preset tiny brings --lr 0.005." in plan(recipe(max_steps=3, host_mem="8G")).reasons
    assert not [r for r in plan(recipe(lr=1e-3, epochs=1, host_mem="8G")).reasons if r.startswith("The preset")]


def test_the_script_makes_the_instruction_set_to_the_byte(tmp_path):
    command = [sys.executable, str(SCRIPTS / "make_tiny.py"), "--data-only", "-o", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    made = (tmp_path / "tiny_data" / "train.jsonl").read_bytes()
    assert made == (PRESETS / "tiny_data" / "train.jsonl").read_bytes()


def test_instructions_are_varied_and_complete():
    lines = (PRESETS / "tiny_data" / "train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert 600 <= len(rows) <= 2000 and len(set(lines)) == len(rows)
    assert all(set(row) == {"instruction", "input", "output"} and row["output"] for row in rows)
    assert len({row["instruction"] for row in rows}) > 50


@pytest.mark.filterwarnings("ignore")
def test_the_base_model_tells_of_its_village():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(PRESETS / "tiny")
    model = AutoModelForCausalLM.from_pretrained(PRESETS / "tiny", dtype=torch.float32).eval()
    ids = tokenizer("It was a cloudy Friday. Gus was at the", return_tensors="pt").input_ids
    text = tokenizer.decode(model.generate(ids, max_new_tokens=30, do_sample=False)[0])
    assert "." in text.removeprefix("It was a cloudy Friday.") and "Gus" in text
    assert tokenizer.decode(tokenizer("Ünïcode 漢字 \t{}").input_ids) == "Ünïcode 漢字 \t{}"
