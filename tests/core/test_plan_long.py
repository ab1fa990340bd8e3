"""What a plan makes of longer context: shifted groups, positions past the model's, what is trained in full."""

from typing import Any

import pytest
from shapes import preset

from effitrain.core.budget import GIB, MemoryBudget
from effitrain.core.errors import InputError
from effitrain.core.plan import Plan, make_plan, resolve
from effitrain.core.recipe import make_recipe


def plan(gpu: int = 24 * GIB, **fields: Any) -> Plan:
    budget = MemoryBudget(gpu, 64 * GIB, GIB, "cuda")
    return make_plan(preset("llama-3.1-8b"), make_recipe(fields), budget)


def test_shifted_groups_are_a_quarter_of_the_length_and_smaller_than_a_sample() -> None:
    made = plan(attention="s2", max_seq_len=8192)
    assert made.settings.s2_group == 2048 and "groups of 2048 tokens" in " ".join(made.reasons)
    assert resolve(make_recipe({"attention": "s2", "max_seq_len": 8192}), made).s2_group == 2048
    assert plan(attention="s2", max_seq_len=1001).settings.s2_group == 250
    assert plan(attention="s2", max_seq_len=8192, s2_group=512).settings.s2_group == 512
    assert plan(max_seq_len=8192).settings.s2_group is None
    with pytest.raises(InputError, match="--s2-group 2048 holds whole samples of --max-seq-len 1024"):
        plan(attention="s2", max_seq_len=1024, s2_group=2048)


def test_shifted_attention_is_faster_and_what_is_trained_in_full_takes_memory() -> None:
    fixed: dict[str, Any] = {"max_seq_len": 16384, "batch_size": 1, "grad_accum": 1, "recompute": "layer", "gpu": 2**46}
    plain, sparse = plan(**fixed), plan(**fixed, attention="s2")
    assert sparse.tokens_per_second_estimate > 1.05 * plain.tokens_per_second_estimate
    assert sparse.peak_bytes - plain.peak_bytes == 16384 * 4096 * 2  # the layer computed again, its output twice
    normed = plan(**fixed, train_norms=True)
    assert plain.peak_bytes < normed.peak_bytes < plain.peak_bytes + 2 * 16384 * 4096 * 2 + 65 * 4096 * 16
    table = plan(**fixed, train_embeddings=True)
    assert table.peak_bytes == plain.peak_bytes  # rows lie on the host
    assert table.host_peak_bytes - plain.host_peak_bytes == 128_256 * (14 * 4096 + 20)


def test_what_lies_past_the_models_length_is_told() -> None:
    assert "longer than the 131072 positions" in " ".join(plan(max_seq_len=140_000, rope_scaling="none").reasons)
