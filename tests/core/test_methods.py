"""What a method trains, and its own defaults."""

import pytest
from shapes import preset

from effitrain.core.budget import GIB, MemoryBudget
from effitrain.core.plan import make_plan
from effitrain.core.recipe import make_recipe


def plan(model: str, **fields):
    budget = MemoryBudget(80 * GIB, 64 * GIB, GIB, "cuda")
    return make_plan(preset(model), make_recipe(fields), budget)


def test_full_tuning_has_defaults_of_its_own() -> None:
    recipe = make_recipe({"method": "full"})
    assert recipe.quant == "none" and make_recipe({}).quant == "nf4"
    made = plan("llama-3.2-1b", method="full")
    assert made.settings.lr == 1e-5 and made.fit == "resident"
    assert plan("llama-3.2-1b").settings.lr == 2e-4


def test_every_weight_has_master_gradient_and_states() -> None:
    for model, params in (("llama-3.2-1b", 1_235_814_400), ("qwen2.5-7b", 7_615_616_512)):
        made = plan(model, method="full", optimizer="adamw", batch_size=1)
        sizes = {line.what: line.bytes for line in made.ledger if line.where == "gpu"}
        assert sizes["trained weights"] == sizes["gradients"] == 4 * params
        assert sizes["optimizer states"] == 8 * params
        assert not {"frozen linears", "embedding", "head", "norms and biases", "adapter weights"} & sizes.keys()


def test_full_training_that_does_not_fit_is_offered_in_4_bits_as_lora_alone() -> None:
    made = plan("llama-70b", method="full", batch_size=8)
    assert not made.fits and made.fit == "resident"
    others = [other for other in made.alternatives if "--method lora --quant nf4" not in other.why]
    assert len(others) < len(made.alternatives)
    assert not any("nf4" in other.why or other.fit != "resident" for other in others)


@pytest.mark.parametrize("method", ["lisa", "lisa-delta", "lisa-lora"])
def test_lisa_s_plan_by_hand(method: str) -> None:
    fields = {"max_steps": 35} if method == "lisa" else {"lora_r": 64}
    made = plan("llama-3.1-8b", method=method, optimizer="adamw", batch_size=1, **fields)
    sizes = {line.what: line.bytes for line in made.ledger}
    matrices, adapters = 218_103_808, 64 * (2 * 8192 + 2 * 5120 + 3 * 18_432)
    norms = 2 * 4096 if method == "lisa" else 0
    trained = 2 * (adapters if method == "lisa-lora" else matrices + norms)
    assert sizes["optimizer states"] == 8 * trained
    assert sizes["adapter gradients" if method == "lisa-lora" else "gradients"] == 4 * trained
    assert sizes.get("adapter weights", 0) == (0 if method == "lisa" else 4 * 32 * adapters)
    assert sizes.get("trained layers", 0) == (8 * 2 * matrices if method == "lisa" else 0)  # 4 rounds of two layers
    assert "head" in sizes and "2 of 32 layers are trained at a time." in made.reasons


def test_embeddings_are_trained_up_to_three_billion_parameters() -> None:
    small, large = plan("llama-3.2-1b", method="lisa"), plan("llama-3.1-8b", method="lisa")
    tables = ["embedding, tied to the head" in {line.what for line in small.ledger}]
    tables.append("embedding" in {line.what for line in large.ledger})
    assert tables == [False, True]
    asked = plan("llama-3.1-8b", method="lisa", lisa_train_embeddings=True)
    assert not {"embedding", "head"} & {line.what for line in asked.ledger}


def test_kept_states_are_never_in_8_bits_and_wait_on_the_host() -> None:
    made = plan("llama-3.1-8b", method="lisa", quant="none", lisa_state="keep-host", max_steps=20, batch_size=1)
    sizes = {line.what: line.bytes for line in made.ledger}
    assert sizes["states of layers that left"] == 4 * 8 * (218_103_808 + 2 * 4096)
    assert made.settings.optimizer == "adamw" and "trained layers" not in sizes
