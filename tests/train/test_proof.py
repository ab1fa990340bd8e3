"""The memory model against the real step: run on shapes for large models, and tracked on a CPU for small ones.

Tolerances are the project's promise: 3 % on shapes, 5 % on a CPU.
"""

import itertools
import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from shapes import config_of, preset

from effitrain.core.budget import CUDA_OVERHEAD_BYTES, GIB, MemoryBudget
from effitrain.core.plan import make_plan, resolve
from effitrain.core.recipe import Recipe, make_recipe
from effitrain.core.spec import ModelSpec
from effitrain.data.batches import MicroBatch
from effitrain.data.tokenized import TokenSet
from effitrain.model.load import find_base
from effitrain.train import proof
from effitrain.train.job import assemble, chosen, make_batches
from effitrain.train.memory import Meter, StorageTracker
from effitrain.train.optim import make_optimizer
from effitrain.train.probe import probe
from effitrain.train.proof import ShapesOfAdamW8bit, Step, proved, track
from effitrain.training import placement_of

CUDA = MemoryBudget(2**50, 2**50, GIB, "cuda")
MODELS = ("llama-3.2-1b", "llama-3.1-8b", "llama-70b")
WAYS: dict[str, dict[str, Any]] = {
    "kept": {"fit": "resident", "recompute": "none"},
    "mlp": {"fit": "resident", "recompute": "mlp"},
    "layer": {"fit": "resident", "recompute": "layer", "offload_activations": "off"},
    "offloaded": {"fit": "resident", "recompute": "layer", "offload_activations": "on"},
    "streamed": {"fit": "stream", "resident_layers": 0, "stream_order": "micro-batch"},
    "half streamed": {
        "fit": "stream",
        "resident_layers": 8,
        "offload_activations": "off",
        "stream_order": "micro-batch",
    },
    "by layer": {"fit": "stream", "resident_layers": 0, "stream_order": "layer", "grad_accum": 4},
    "tiled": {"fit": "stream", "resident_layers": 0, "stream_order": "micro-batch", "mlp_tiles": 4},
    "in groups": {"fit": "stream", "resident_layers": 2, "stream_order": "layer", "grad_accum": 8},
    "shifted": {"fit": "resident", "recompute": "mlp", "attention": "s2", "rope_scaling": "none"},
    "in full": {"fit": "resident", "recompute": "none", "train_norms": True, "train_embeddings": True},
    "long, streamed": {
        "fit": "stream",
        "resident_layers": 8,
        "attention": "s2",
        "train_norms": True,
        "train_embeddings": True,
    },
    "pruned": {"fit": "prune", "prune_ratio": 0.85, "recompute": "layer", "offload_activations": "off"},
    "pruned, streamed": {"fit": "prune", "prune_ratio": 0.5, "resident_layers": 4, "stream_order": "micro-batch"},
}
GRID = list(itertools.product(MODELS, WAYS, (512, 2048, 8192), ("adamw", "adamw8bit")))
# Every way with two of the three models, lengths and optimizers in turn: what CI has time for.
COVER = [
    (m, w, (512, 2048, 8192)[(i + j) % 3], ("adamw", "adamw8bit")[j % 2])
    for i, m in enumerate(MODELS)
    for j, w in enumerate(WAYS)
    if (i + 2 * j) % 3 < 2
]


FULL = {
    "kept": {"recompute": "none"},
    "mlp": {"recompute": "mlp"},
    "layer": {"recompute": "layer", "offload_activations": "off"},
    "offloaded": {"recompute": "layer", "offload_activations": "on"},
    "half states": {"recompute": "layer", "optimizer": "adamw8bit"},
}


@pytest.mark.parametrize("way", FULL)
@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("model", ["llama-3.2-1b", "qwen2.5-7b"])  # tied, and not
def test_full_tuning_is_predicted_too(model: str, device: str, way: str) -> None:
    spec, config = preset(model), config_of(model)
    budget = CUDA if device == "cuda" else replace(CUDA, device="cpu", overhead_bytes=0)
    recipe = make_recipe({"method": "full", "max_seq_len": 1024, "batch_size": 1, "optimizer": "adamw", **FULL[way]})
    proof = proved(make_plan(spec, recipe, budget), spec, config, recipe, device).proof
    assert proof is not None and abs(proof["error"]) < 0.03


def short_of(spec: ModelSpec, recipe: Recipe) -> MemoryBudget:
    """Host memory that lacks room for the layer inputs of the last micro-batch."""
    ledger = {line.what: line.bytes for line in make_plan(spec, recipe, CUDA).ledger if line.where == "host"}
    inputs = ledger["layer inputs, offloaded"] // chosen(recipe.grad_accum)
    return replace(CUDA, host_bytes=sum(ledger.values()) - ledger["streamed layers"] - inputs)


LISA: dict[str, tuple[str, dict[str, Any]]] = {
    "kept": ("llama-3.2-1b", {"method": "lisa", "quant": "none", "recompute": "none"}),
    "one layer": ("llama-3.2-1b", {"method": "lisa", "quant": "none", "recompute": "layer", "lisa_layers": 1}),
    "tables": (
        "llama-3.1-8b",
        {"method": "lisa", "quant": "none", "lisa_train_embeddings": True, "recompute": "layer"},
    ),
    "tables by layer": (
        "llama-3.1-8b",
        {"method": "lisa", "lisa_train_embeddings": True, "fit": "stream", "stream_order": "layer", "grad_accum": 3},
    ),
    "quantised": ("llama-3.2-1b", {"method": "lisa", "recompute": "mlp"}),
    "streamed": ("llama-3.1-8b", {"method": "lisa", "fit": "stream", "resident_layers": 8}),
    "adapters": ("llama-3.1-8b", {"method": "lisa-lora", "recompute": "none"}),
    "adapters, streamed": ("llama-70b", {"method": "lisa-lora", "fit": "stream", "resident_layers": 4}),
    "delta": ("llama-3.1-8b", {"method": "lisa-delta", "lora_r": 64, "recompute": "layer"}),
    "delta, streamed": ("llama-70b", {"method": "lisa-delta", "lora_r": 64, "fit": "stream", "lisa_layers": 1}),
}


@pytest.mark.parametrize("way", LISA)
@pytest.mark.parametrize("device", ["cuda", pytest.param("cpu", marks=pytest.mark.slow)])
def test_layers_by_turns_are_predicted_too(device: str, way: str) -> None:
    """With the layers trained that take most: the first, where the backward pass ends, and the last."""
    model, fields = LISA[way]
    spec, config = preset(model), config_of(model)
    budget = CUDA if device == "cuda" else replace(CUDA, device="cpu", overhead_bytes=0)
    fixed = {"max_seq_len": 1024, "batch_size": 1, "optimizer": "adamw", "stream_order": "micro-batch"}
    tables = {"lisa_train_embeddings": False} if fields["method"] == "lisa" else {}
    recipe = make_recipe({**fixed, "offload_activations": "off", **tables, **fields})
    proof = proved(make_plan(spec, recipe, budget), spec, config, recipe, device).proof
    assert proof is not None and abs(proof["error"]) < 0.03


def error_of(model: str, way: str, tokens: int, optimizer: str) -> float:
    spec, config = preset(model), config_of(model)
    fields = {"max_seq_len": tokens, "batch_size": 1, "optimizer": optimizer, **WAYS[way]}
    recipe = make_recipe(fields)
    plan = make_plan(spec, recipe, CUDA if way != "in groups" else short_of(spec, recipe))
    plan = proved(plan, spec, config, recipe, "cuda")
    assert plan.proof is not None
    assert plan.proof["peak_bytes"] - GIB == sum(part["tracked_bytes"] for part in plan.proof["components"])
    return plan.proof["error"]


@pytest.mark.parametrize(("model", "way", "tokens", "optimizer"), COVER)
def test_predicted_peaks_are_within_three_percent_of_the_step_run_on_shapes(
    model: str, way: str, tokens: int, optimizer: str
) -> None:
    assert abs(error_of(model, way, tokens, optimizer)) < 0.03


def test_micro_batches_that_pass_a_layer_together_are_counted_once() -> None:
    """In a model so small that they are most of the step."""
    spec, config = preset("tiny"), config_of("tiny")
    for size, count in ((8, 2), (2, 4)):
        fields = {"fit": "stream", "resident_layers": 0, "max_seq_len": 512, "batch_size": size, "grad_accum": count}
        recipe = make_recipe({**fields, "stream_order": "layer"})
        budget = replace(CUDA, device="cpu", overhead_bytes=0)
        proof = proved(make_plan(spec, recipe, budget), spec, config, recipe, "cpu").proof
        assert proof is not None and abs(proof["error"]) < 0.01


@pytest.mark.parametrize(("tokens", "most"), [(2048, 9.2), (8192, 12.0)])
def test_a_streamed_70b_takes_what_is_promised(tokens: int, most: float) -> None:
    spec, config = preset("llama-70b"), config_of("llama-70b")
    fields = {"fit": "stream", "resident_layers": 0, "max_seq_len": tokens, "batch_size": 1, "optimizer": "adamw"}
    recipe = make_recipe({**fields, "stream_order": "micro-batch"})
    budget = replace(CUDA, overhead_bytes=CUDA_OVERHEAD_BYTES)
    plan = proved(make_plan(spec, recipe, budget), spec, config, recipe, "cuda")
    assert plan.proof is not None
    assert max(plan.peak_bytes, plan.proof["peak_bytes"]) <= most * GIB


@pytest.mark.slow
@pytest.mark.parametrize(("model", "way", "tokens", "optimizer"), GRID)
def test_every_combination(model: str, way: str, tokens: int, optimizer: str) -> None:
    assert abs(error_of(model, way, tokens, optimizer)) < 0.03


@pytest.mark.parametrize("way", ["kept", "offloaded", "half streamed", "pruned"])
def test_a_few_layers_tell_what_all_of_them_take(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, config = preset("llama-3.2-1b"), config_of("llama-3.2-1b")
    recipe = make_recipe({"max_seq_len": 512, "batch_size": 1, "optimizer": "adamw", **WAYS[way]})
    plan = make_plan(spec, recipe, CUDA)
    few = proved(plan, spec, config, recipe, "cuda").proof
    monkeypatch.setattr(proof, "KEPT", 100)
    monkeypatch.setattr(proof, "KEPT_STREAMED", 100)
    whole = proved(plan, spec, config, recipe, "cuda").proof
    assert few is not None and whole is not None and few["components"] == whole["components"]


@pytest.mark.parametrize("size", [100, 4096, 10_000])
def test_the_twin_of_the_8bit_optimizer_has_its_states(size: int) -> None:
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    weight, twin = (torch.nn.Parameter(torch.zeros(size)) for _ in range(2))
    real = make_optimizer("adamw8bit", [weight], 1e-3, 0.0)
    weight.grad = torch.ones(size)
    real.step()
    tables = ("qmap1", "qmap2")  # two code tables, shared by all tensors
    held = {k: v.nbytes for k, v in real.state[weight].items() if torch.is_tensor(v) and k not in tables}
    shapes = ShapesOfAdamW8bit([twin], {})
    shapes.step()
    assert sum(v.nbytes for v in shapes.state[twin].values()) == sum(held.values())


def test_no_logits_of_all_tokens_and_no_fp32_copy_of_a_frozen_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every storage of an 8B step at 8,192 tokens: none of tokens x vocabulary, none of a weight's size in fp32."""
    spec, config = preset("llama-3.1-8b"), config_of("llama-3.1-8b")
    sizes: set[tuple[int, torch.dtype]] = set()

    class Sizes(StorageTracker):
        def add(self, tensors: Any) -> None:
            tensors = list(tensors)
            sizes.update((tensor.untyped_storage().nbytes(), tensor.dtype) for tensor in tensors)
            super().add(tensors)

    monkeypatch.setattr(proof, "StorageTracker", Sizes)
    recipe = make_recipe(
        {"max_seq_len": 8192, "batch_size": 1, "recompute": "layer", "optimizer": "adamw", "fit": "resident"}
    )
    full = resolve(recipe, make_plan(spec, recipe, CUDA))
    track(Step(spec, config, full, "cuda", (False,) * spec.num_layers, trained=(True,) * spec.num_layers))
    frozen = {linear.weights for linear in (*spec.layers[0].linears, spec.head)}
    tokens_wide = {8192 * linear.out_features for linear in spec.layers[0].linears}  # activations may have that size
    assert (2 * spec.head.weights, torch.bfloat16) in sizes  # the head is there, so the scan sees what it should
    assert max(size for size, _ in sizes) < 2 * 8192 * spec.vocab
    copies = {size for size, dtype in sizes if dtype == torch.float32 and size // 4 in frozen - tokens_wide}
    assert not copies


CPU_WAYS: dict[str, dict[str, Any]] = {
    "kept": {},
    "plain weights": {"quant": "none"},
    "mlp": {"recompute": "mlp"},
    "layer": {"recompute": "layer"},
    "offloaded": {"recompute": "layer", "offload_activations": "on"},
    "half precision": {"dtype": "bf16"},
    "dropout": {"lora_dropout": 0.1},
    "streamed": {"fit": "stream", "resident_layers": 1, "stream_order": "micro-batch"},
    "tiled": {"recompute": "layer", "mlp_tiles": 5},
    "tiled, half precision": {"recompute": "layer", "offload_activations": "on", "mlp_tiles": 3, "dtype": "bf16"},
    "tiled, some linears": {"recompute": "layer", "mlp_tiles": 8, "lora_targets": "q_proj,down_proj"},
    "8-bit states": {"optimizer": "adamw8bit"},
    "some linears": {"lora_targets": "q_proj,lm_head"},
    "full": {"method": "full"},
    "full, layer": {"method": "full", "recompute": "layer"},
    "full, half precision": {"method": "full", "dtype": "bf16"},
    "shifted": {"attention": "s2", "recompute": "layer"},
    "norms": {"train_norms": True},
    "norms and embedding": {"train_norms": True, "train_embeddings": True, "recompute": "mlp"},
    "lisa": {"method": "lisa", "quant": "none", "lisa_train_embeddings": False},
    "lisa, quantised": {"method": "lisa", "lisa_train_embeddings": False, "recompute": "layer"},
    "lisa-lora": {"method": "lisa-lora"},
    "lisa-delta": {"method": "lisa-delta"},
}


def measured_error(model: str, **fields: Any) -> float:
    """Predicted over measured peak of a CPU step on full rows, less one."""
    rows, length = 2, 256
    fixed = {"model": model, "batch_size": rows, "max_seq_len": length, "grad_accum": 1, "optimizer": "adamw"}
    recipe, base = make_recipe({**fixed, **fields}), find_base(model, fields.get("weights"))
    plan = make_plan(base.spec, recipe, MemoryBudget(2**40, 2**40, 0, "cpu"))
    full = resolve(recipe, plan)
    numbers = np.zeros(rows * length, dtype=np.int32)
    tokens = TokenSet(numbers, numbers, np.arange(0, rows * length + 1, length))
    job = assemble(full, base.fetched(), make_batches(tokens, full), torch.device("cpu"), placement=placement_of(plan))
    ids, places = torch.randint(3, base.spec.vocab, (rows * length,)), torch.arange(rows * length)
    batch = MicroBatch(ids, ids, places % length, (length,) * rows, places, rows)
    meter = Meter(torch.device("cpu"))
    probe(job.decoder, [batch], job.optimizer, job.clock, meter)
    return plan.peak_bytes / meter.peak() - 1


@pytest.mark.parametrize("way", CPU_WAYS)
def test_predicted_peaks_are_within_five_percent_of_a_real_step(data_dir: Any, way: str) -> None:
    assert abs(measured_error(str(data_dir / "models" / "stories3M"), **CPU_WAYS[way])) < 0.05


@pytest.mark.parametrize("way", ["kept", "offloaded"])
def test_the_same_of_a_hundred_million_parameters(way: str, tmp_path: Any) -> None:
    import json

    config = {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048,
        "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4, "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert abs(measured_error(str(tmp_path), weights="synthetic", **CPU_WAYS[way])) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("tiles", [1, 8])
def test_a_70b_at_32k_tokens_is_proved_within_24_gib(tiles: int) -> None:
    spec, config = preset("llama-3.1-70b"), config_of("llama-3.1-70b")
    recipe = make_recipe({"max_seq_len": 32768, "batch_size": 1, "mlp_tiles": tiles})
    plan = make_plan(spec, recipe, MemoryBudget(24 * GIB, 64 * GIB, GIB * 12 // 10, "cuda"))
    assert plan.fits and plan.fit == "stream"
    proof = proved(plan, spec, config, recipe, "cuda").proof
    assert proof is not None and abs(proof["error"]) < 0.03 and proof["peak_bytes"] <= 24 * GIB
