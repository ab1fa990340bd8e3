"""Plans of evaluation and chat; tests/evals/test_forward_memory.py compares their bytes with what is really taken."""

from typing import Any

import pytest
from shapes import preset

from effitrain.core.budget import GIB, MemoryBudget
from effitrain.core.plan import make_plan, resolve
from effitrain.core.recipe import make_recipe


@pytest.mark.parametrize("work", ["score", "chat"])
def test_evaluation_and_chat_take_less_than_training_and_are_offered_their_own_flags(work: Any) -> None:
    spec = preset("llama-3.1-8b")
    recipe = make_recipe({"batch_size": 2, "max_seq_len": 4096, "dtype": "fp32"})
    roomy, tight = (MemoryBudget(size, 64 * GIB, GIB, "cuda") for size in (40 * GIB, 3 * GIB))
    used, trained = make_plan(spec, recipe, roomy, work), make_plan(spec, recipe, roomy)
    assert used.fits and used.peak_bytes < trained.peak_bytes
    names = {line.what for line in used.ledger}
    assert not names & {"adapter gradients", "optimizer states", "layer computed again"}
    assert ("keys and values" in names) == (work == "chat")
    offers = [row.why for row in make_plan(spec, recipe, tight, work).alternatives if row.why.startswith("--")]
    flags = {word for why in offers for word in why.split() if word.startswith("--")}
    assert flags and flags <= {"--fit", "--batch-size", "--max-seq-len", "--dtype", "--quant"}
    streamed = make_plan(spec, recipe.changed(dtype="bf16"), MemoryBudget(6 * GIB, 64 * GIB, GIB, "cuda"), work)
    assert streamed.fits and streamed.fit == "stream"
    assert resolve(recipe, streamed).fit == "stream"
