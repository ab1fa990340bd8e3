import pytest

from effitrain.core.names import ELSEWHERE, nearest_name
from effitrain.core.recipe import Recipe

FIELDS = list(Recipe.model_fields)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("learning_rate", "lr"), ("lora_rank", "lora_r"), ("rank", "lora_r"), ("num_train_epochs", "epochs"),
        ("per_device_train_batch_size", "batch_size"), ("gradient_accumulation_steps", "grad_accum"),
        ("model_name_or_path", "model"), ("cutoff_len", "max_seq_len"), ("max_length", "max_seq_len"),
        ("output", "output_dir"), ("batchsize", "batch_size"), ("lora_targts", "lora_targets"),
        ("lerning_rate", "lr"), ("cutoff_lenght", "max_seq_len"), ("load_in_4bits", "quant"), ("lora_rnk", "lora_r"),
        ("gradient_acumulation_step", "grad_accum"), ("num_epoch", "epochs"), ("quantt", "quant"),
    ],
)  # fmt: skip
def test_names_of_other_tools_and_misspelt_ones(theirs: str, ours: str) -> None:
    assert nearest_name(theirs, FIELDS) == ours


@pytest.mark.parametrize("name", ["zzz", "verbose", "device", "workers", "num"])
def test_a_name_like_no_other_stands_for_none(name: str) -> None:
    assert nearest_name(name, FIELDS) is None


def test_a_name_that_is_not_offered() -> None:
    assert nearest_name("learning_rate", ["model", "output_dir"]) is None


def test_the_table_names_fields_and_no_field_stands_for_another() -> None:
    theirs = [name for names in ELSEWHERE.values() for name in names]
    assert set(ELSEWHERE) <= set(FIELDS) and len(set(theirs)) == len(theirs)
    assert not set(theirs) & set(FIELDS)
