from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effitrain.core.errors import InputError
from effitrain.core.recipe import RUNTIME_FIELDS, Recipe, make_recipe, read_recipe_file


def test_every_field_has_a_default_that_validates() -> None:
    assert make_recipe({}) == make_recipe(Recipe().model_dump())


def test_every_field_has_help_and_a_group() -> None:
    for name, field in Recipe.model_fields.items():
        assert field.description, name
        assert isinstance(field.json_schema_extra, dict) and field.json_schema_extra["group"], name


def test_text_of_the_command_line_becomes_values() -> None:
    recipe = make_recipe(
        {
            "gpu_mem": "20G",
            "host_mem": "48GB",
            "columns": "prompt=question, completion=answer",
            "lora_targets": "q_proj, v_proj,",
            "batch_size": "8",
            "lr": "2e-3",
            "packing": "true",
        }
    )
    assert (recipe.gpu_mem, recipe.host_mem) == (20 * 2**30, 48 * 10**9)
    assert recipe.columns == {"prompt": "question", "completion": "answer"}
    assert recipe.lora_targets == ("q_proj", "v_proj")
    assert (recipe.batch_size, recipe.lr, recipe.packing) == (8, 2e-3, True)


@pytest.mark.parametrize(
    "field", ["gpu_mem", "host_mem", "max_seq_len", "batch_size", "grad_accum", "lr", "save_every", "lora_targets"]
)
def test_auto_leaves_the_choice_to_the_plan(field: str) -> None:
    assert getattr(make_recipe({field: "auto"}), field) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch_size", 0),
        ("batch_size", "many"),
        ("lr", 0),
        ("lr", "nan"),
        ("warmup", 1.0),
        ("eval_fraction", -0.1),
        ("max_seq_len", 7),
        ("lora_r", 0),
        ("quant", "int8"),
        ("dtype", "float16"),
        ("format", "jsonl"),
        ("recompute", "attention"),
        ("weights", "synthetic:x"),
        ("columns", "prompt"),
        ("gpu_mem", "plenty"),
        ("seed", -1),
    ],
)
def test_a_bad_value_is_named_by_its_flag(field: str, value: object) -> None:
    with pytest.raises(InputError) as caught:
        make_recipe({field: value})
    message = str(caught.value)
    assert "--" + field.replace("_", "-") in message or "memory size" in message
    assert "pydantic" not in message and "effitrain run --help" in message


def test_all_bad_fields_come_in_one_message() -> None:
    with pytest.raises(InputError) as caught:
        make_recipe({"batch_size": 0, "lr": -1, "learning_rate": 3, "method": "lisa", "lisa_layers": 0})
    message = str(caught.value)
    for part in ("--batch-size 0", "--lr -1", "Unknown key 'learning_rate'", "--lisa-layers 0"):
        assert part in message


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("batchsize", "batch_size"), ("model_name", "model"), ("lora_rank", "lora_r"), ("learning_rate", "lr")],
)
def test_an_unknown_key_gets_the_nearest_name(key: str, nearest: str) -> None:
    with pytest.raises(InputError, match=f"Unknown key '{key}'. Did you mean '({nearest})'"):
        make_recipe({key: 1})


def test_a_key_like_no_other_gets_no_guess() -> None:
    with pytest.raises(InputError, match=r"Unknown key 'zzz'\.\n"):
        make_recipe({"zzz": 1})


def test_a_recipe_is_frozen_and_changed_validates_again() -> None:
    recipe = make_recipe({"lora_r": 8})
    with pytest.raises(ValueError, match="frozen"):
        recipe.lora_r = 4
    assert recipe.changed(lora_r=4).lora_r == 4 and recipe.lora_r == 8
    with pytest.raises(InputError):
        recipe.changed(lora_r=0)
    with pytest.raises(InputError, match="Unknown key"):
        recipe.changed(lora_rang=1)


recipes = st.fixed_dictionaries(
    {},
    optional={
        "model": st.text(st.characters(codec="utf-8", exclude_categories=("C",)), min_size=1),
        "columns": st.dictionaries(st.sampled_from(["prompt", "completion"]), st.text("abc", min_size=1)),
        "lora_targets": st.lists(st.sampled_from(["q_proj", "lm_head"]), min_size=1),
        "gpu_mem": st.integers(2**20, 2**50),
        "lr": st.floats(1e-9, 1.0),
        "seed": st.integers(0, 2**63 - 1),
        "packing": st.booleans(),
        "quant": st.sampled_from(["nf4", "none"]),
    },
)


@given(recipes)
def test_yaml_reads_back_as_an_equal_recipe(fields: dict[str, object]) -> None:
    import yaml

    recipe = make_recipe(fields)
    assert make_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


def test_a_recipe_file_may_use_the_flags_spelling(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("lora-r: 4\nmax_seq_len: 64\n")
    assert read_recipe_file(path) == {"lora_r": 4, "max_seq_len": 64}


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n", "", "word", b"\xff\xfe\x00"])
def test_a_recipe_file_that_is_none_is_refused(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=r"recipe\.yaml"):
        read_recipe_file(path)


def test_a_recipe_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file") as caught:
        read_recipe_file(tmp_path / "none.yaml")
    assert "--config" in caught.value.next_step


def test_what_decides_the_result() -> None:
    recipe = make_recipe({})
    same = {"output_dir": "x", "resume": "never", "save_every": 3, "gpu_mem": 2**30, "report_to": "wandb"}
    assert set(same) <= RUNTIME_FIELDS <= set(Recipe.model_fields)
    assert recipe.changed(**same).result_fields() == recipe.result_fields()
    for change in ({"seed": 1}, {"lora_r": 8}, {"dataset": "x"}, {"batch_size": 2}, {"quant": "none"}):
        assert recipe.changed(**change).result_fields() != recipe.result_fields()


def test_every_field_is_in_one_group() -> None:
    groups = ("model", "data", "output", "memory", "training", "adapter", "lisa", "pruning")
    assert sorted(name for group in groups for name in Recipe.fields_in(group)) == sorted(Recipe.model_fields)
    assert Recipe.fields_in("model") == ("model", "weights")
