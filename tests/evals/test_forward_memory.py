"""The memory model of evaluation and chat against the passes themselves: on shapes for large models, and on a CPU.

Tolerances are those of the training step: 3 % on shapes, 5 % on a CPU.
"""

from typing import Any

import pytest
import torch
from shapes import config_of, preset

from effitrain.adapters.attach import attach
from effitrain.adapters.base import AdapterConfig, Clock
from effitrain.core.budget import GIB, MemoryBudget
from effitrain.core.plan import Plan, make_plan, resolve
from effitrain.core.recipe import Recipe, make_recipe
from effitrain.evals.generate import generate_all
from effitrain.model.load import find_base, load_model
from effitrain.train import proof
from effitrain.train.loss import loss_sums
from effitrain.train.memory import StorageTracker, model_tensors
from effitrain.training import placement_of

CUDA, CPU = MemoryBudget(2**50, 2**50, GIB, "cuda"), MemoryBudget(2**50, 2**50, 0, "cpu")


def score(decoder: Any, recipe: Recipe, plan: Plan) -> None:
    """A group of full micro-batches."""
    with torch.no_grad():
        list(loss_sums(decoder.eval(), [proof._full_batch(recipe) for _ in range(plan.settings.at_once)]))


def on_shapes(model: str, **fields: Any) -> tuple[int, int]:
    """Predicted and tracked bytes of scoring."""
    spec, recipe = preset(model), make_recipe(fields)
    plan = make_plan(spec, recipe, CUDA, "score")
    placement, full = placement_of(plan), resolve(recipe, plan)
    visits = tuple(placement is not None and layer in placement.streamed for layer in range(spec.num_layers))
    with proof._symbolic():
        step = proof.Step(spec, config_of(model), full, "cuda", visits)
        decoder = proof._model(step)
        tracker = StorageTracker()
        if step.host_embedding:
            tracker.ignore(decoder.model.embed_tokens.weight)
        tracker.add(model_tensors(decoder))
        with tracker:
            score(decoder, full, plan)
    return plan.peak_bytes - GIB, tracker.peak


@pytest.mark.parametrize("tokens", [512, 8192])
@pytest.mark.parametrize(
    ("model", "fields"),
    [
        ("llama-3.2-1b", {"fit": "resident"}),
        ("llama-3.2-1b", {"fit": "resident", "quant": "none"}),
        ("llama-3.1-8b", {"fit": "stream", "resident_layers": 4, "stream_order": "micro-batch"}),
        ("llama-3.1-8b", {"fit": "stream", "resident_layers": 0, "stream_order": "layer", "grad_accum": 4}),
    ],
)
def test_scoring_on_shapes(model: str, fields: dict[str, Any], tokens: int) -> None:
    predicted, tracked = on_shapes(model, max_seq_len=tokens, batch_size=1, **fields)
    assert predicted == pytest.approx(tracked, rel=0.03)


@pytest.fixture
def ready(tmp_path: Any) -> Any:
    """``ready(work, **fields)``: a random model of 100M parameters with adapters, its plan, and a tracker."""
    import json

    config = {
        "model_type": "llama", "vocab_size": 8000, "hidden_size": 512, "intermediate_size": 1408,
        "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))

    def make(work: Any, **fields: Any) -> tuple[Any, Recipe, Plan, StorageTracker]:
        recipe = make_recipe({"model": str(tmp_path), "weights": "synthetic", **fields})
        base = find_base(recipe.model, recipe.weights)
        plan = make_plan(base.spec, recipe, CPU, work)
        full = resolve(recipe, plan)
        decoder = load_model(base, full, torch.device("cpu"), placement=placement_of(plan)).eval()
        attach(decoder, AdapterConfig.of(full), Clock())
        tracker = StorageTracker()
        tracker.add(model_tensors(decoder))
        return decoder, full, plan, tracker

    return make


@pytest.mark.parametrize("fields", [{}, {"fit": "stream", "grad_accum": 3, "stream_order": "layer"}])
def test_scoring_on_a_cpu(ready: Any, fields: dict[str, Any]) -> None:
    decoder, recipe, plan, tracker = ready("score", batch_size=2, max_seq_len=256, **fields)
    with tracker:
        score(decoder, recipe, plan)
    assert plan.peak_bytes == pytest.approx(tracker.peak, rel=0.05)


@pytest.mark.parametrize("fields", [{"batch_size": 1}, {"batch_size": 3, "fit": "stream", "resident_layers": 2}])
def test_chat_on_a_cpu(ready: Any, fields: dict[str, Any]) -> None:
    """Conversations that fill the length they are planned for."""
    decoder, _, plan, tracker = ready("chat", max_seq_len=512, **fields)
    prompts: list[list[int]] = [torch.randint(3, 8000, (509,)).tolist() for _ in range(plan.settings.at_once)]
    with tracker:
        made = generate_all(decoder, prompts, 50, set(), length=plan.settings.max_seq_len)
    assert [len(ids) for ids in made] == [3] * fields["batch_size"]
    assert plan.peak_bytes == pytest.approx(tracker.peak, rel=0.05)
