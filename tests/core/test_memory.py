"""The terms of the memory model, against figures counted by hand and against what torch really holds."""

import logging
from dataclasses import replace
from typing import Any

import pytest
from shapes import preset

from effitrain.core.budget import GIB, MemoryBudget
from effitrain.core.ledger import LedgerLine, Settings, gpu_bytes
from effitrain.core.memory import make_ledger, nf4_bytes, optimizer_bytes, saved_bytes
from effitrain.core.recipe import make_recipe
from effitrain.core.spec import spec_from_config

CUDA = MemoryBudget(24 * GIB, 64 * GIB, GIB, "cuda")
CPU = MemoryBudget(24 * GIB, 64 * GIB, 0, "cpu")
SETTINGS = Settings(512, 1, 16, "bf16", "layer", False, "adamw", 2e-4)


def ledger(
    model: str = "llama-70b", settings: Settings = SETTINGS, budget: MemoryBudget = CUDA, **fields: Any
) -> dict[str, LedgerLine]:
    lines = make_ledger(preset(model), make_recipe(fields), settings, budget)
    assert len({line.what for line in lines}) == len(lines)
    return {line.what: line for line in lines}


def test_resident_lines_of_llama_70b_by_hand() -> None:
    lines = ledger()
    sizes = {what: (line.where, line.bytes) for what, line in lines.items()}
    table, lora = 128_256 * 8192, 207_093_760
    assert sizes["frozen linears"] == ("gpu", 35_311_779_840)
    assert sizes["NF4 offsets"] == ("gpu", 560 * 4)
    assert sizes["embedding"] == ("host", 2 * table) and sizes["head"] == ("gpu", 2 * table)
    assert sizes["norms and biases"] == ("gpu", 2 * (80 * 2 * 8192 + 8192))
    assert sizes["adapter weights"] == sizes["adapter gradients"] == ("gpu", 4 * lora)
    assert sizes["optimizer states"] == ("gpu", 8 * lora)
    assert sizes["context and slack"] == ("gpu", GIB)
    assert "68,451,041,280 weights" in lines["frozen linears"].formula
    assert "rank 16" in lines["adapter weights"].formula


def test_step_lines_of_llama_70b_by_hand() -> None:
    sizes = {what: line.bytes for what, line in ledger().items()}
    assert sizes["layer inputs"] == 80 * 512 * 8192 * 2
    assert sizes["dequantised weight"] == 8192 * 28672 * 2 + 8192 * 28672 // 64 * 4
    norms, attention = 2 * (4 * 8192 + 4) + 2 * 8192 * 2, 2 * (8192 + 1024) * 2 + 4 * 64
    assert sizes["layer computed again"] == 512 * (norms + attention + 3 * 28672 * 2 + 7 * 16 * 2)
    assert sizes["layer gradients"] == 512 * (2 * 8192 + 28672) * 2


@pytest.mark.parametrize(("tokens", "published"), [(512, 39.6), (2048, 42.2), (4096, 45.5), (8192, 52.2)])
def test_totals_of_llama_70b_agree_with_the_published_estimate(tokens: int, published: float) -> None:
    # The estimate counts 12 B per adapter weight where fp32 weights, gradients and moments are 16.
    settings, budget = replace(SETTINGS, max_seq_len=tokens), replace(CUDA, overhead_bytes=GIB * 12 // 10)
    total = gpu_bytes(ledger(settings=settings, budget=budget).values()) - 4 * 207_093_760
    assert total / GIB == pytest.approx(published, rel=0.02)


def test_nf4_parts_are_rounded_up() -> None:
    assert nf4_bytes(1) == 1 + 1 + 4
    assert nf4_bytes(65) == 33 + 2 + 4
    assert nf4_bytes(64 * 256) == 64 * 128 + 256 + 4
    assert nf4_bytes(64 * 256 + 1) == 64 * 128 + 1 + 257 + 8


def test_unquantised_linears_take_the_compute_dtype() -> None:
    lines = ledger(quant="none")
    assert lines["frozen linears"].bytes == 2 * 68_451_041_280
    assert not {"NF4 offsets", "dequantised weight"} & set(lines)


def test_on_a_cpu_everything_is_the_device() -> None:
    lines = ledger(settings=replace(SETTINGS, dtype="fp32"), budget=CPU)
    assert lines["embedding"].where == "gpu" and lines["embedding"].bytes == 4 * 128_256 * 8192
    assert "context and slack" not in lines
    assert {what for what, line in lines.items() if line.where == "host"} == {
        "largest tensor, while it loads",
        "process and data",
    }


@pytest.mark.parametrize("budget", [CUDA, CPU])
def test_a_tied_embedding_is_counted_once_on_the_device(budget: MemoryBudget) -> None:
    lines = ledger("llama-3.2-1b", budget=budget)
    assert lines["embedding, tied to the head"].where == "gpu"
    assert not {"embedding", "head"} & set(lines)


def test_biases_stand_beside_the_norms() -> None:
    lines = ledger("qwen2.5-7b")
    assert lines["norms and biases"].bytes == 2 * (28 * (2 * 3584 + 3584 + 2 * 512) + 3584)


@pytest.mark.parametrize(
    ("targets", "weights"),
    [
        ("q_proj", 80 * 16 * (8192 + 8192)),
        ("self_attn.k_proj,v_proj", 2 * 80 * 16 * (8192 + 1024)),
        ("lm_head", 16 * (8192 + 128_256)),
        ("down_proj,lm_head", 80 * 16 * (28672 + 8192) + 16 * (8192 + 128_256)),
    ],
)
def test_adapters_lie_on_the_targets_only(targets: str, weights: int) -> None:
    assert ledger(lora_targets=targets)["adapter weights"].bytes == 4 * weights


def test_what_no_adapter_needs_is_not_kept() -> None:
    spec = preset("llama-3.1-8b")

    def kept(targets: str | None) -> int:
        return sum(saved_bytes(spec.layers[0], spec, make_recipe({"lora_targets": targets}), 2))

    nothing = kept("lm_head")
    rank = 16 * 2
    assert kept("q_proj") == nothing + 4096 * 2 + rank
    assert kept("q_proj,k_proj,v_proj") == nothing + 4096 * 2 + 3 * rank
    assert kept("o_proj") == nothing + rank  # attention keeps its output anyway
    assert kept("down_proj") == nothing + 14336 * 2 + rank
    assert kept(None) == nothing + 2 * 4096 * 2 + 14336 * 2 + 7 * rank
    dropped = sum(saved_bytes(spec.layers[0], spec, make_recipe({"lora_dropout": 0.1}), 2)) - kept(None)
    shared = (2 * 4096 + 14336) * 2  # what adapters share, each then has of its own
    assert dropped == (6 * 4096 + 14336) * 3 - shared


def test_what_is_trained_in_full_by_hand() -> None:
    plain, lines = ledger("qwen3-8b"), ledger("qwen3-8b", train_norms=True, train_embeddings=True)
    norms = (2 * 36 + 1) * 4096 + 2 * 36 * 128
    more = {what: lines[what].bytes - plain[what].bytes for what in ("adapter weights", "optimizer states")}
    assert more == {"adapter weights": 4 * norms, "optimizer states": 8 * norms}
    assert "norms and biases" not in lines and "rank 16 and norms" in lines["adapter weights"].formula
    table = 151_936 * 4096
    assert {what: (line.where, line.bytes) for what, line in lines.items() if "embedding" in what} == {
        "embedding, trained": ("host", 4 * table),
        "embedding gradient": ("host", 4 * table + 8 * 151_936),
        "embedding moments": ("host", 8 * table + 12 * 151_936),
    }
    on_cpu = ledger("llama-3.2-1b", budget=CPU, train_embeddings=True)
    assert on_cpu["embedding, trained"].where == "gpu" and on_cpu["head"].bytes == 2 * 128_256 * 2048  # untied by it


LAYER = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma"])
def test_autograd_keeps_what_the_model_says(family: str, dtype: str) -> None:
    """A frozen layer keeps, to the byte, what is counted for a layer without adapters."""
    import torch
    from transformers import AutoConfig, AutoModel

    from effitrain.model.decoder import GatedMLP

    config = {**LAYER, "model_type": family, **({} if family == "qwen2" else {"head_dim": 16})}
    spec = spec_from_config(config, family)
    model = AutoModel.from_config(AutoConfig.for_model(**config, attn_implementation="sdpa")).to(getattr(torch, dtype))
    model.requires_grad_(False)
    model.layers[0].mlp = GatedMLP(model.layers[0].mlp, model.config.hidden_act)
    tokens = 96
    hidden = torch.randn(1, tokens, spec.hidden, dtype=getattr(torch, dtype), requires_grad=True)
    tables = model.rotary_emb(hidden, torch.arange(tokens)[None])
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *tables)}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and storage.nbytes() >= tokens * 4:  # less is a frozen norm's 1 + weight
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model.layers[0](hidden, position_embeddings=tables, attention_mask=None)
    recipe = make_recipe({"lora_targets": "lm_head"})
    assert sum(saved.values()) == tokens * sum(saved_bytes(spec.layers[0], spec, recipe, hidden.element_size()))
    assert out is not None


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 10_000, 131_072])
def test_optimizer_states_are_those_bitsandbytes_makes(size: int) -> None:
    import torch

    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight = torch.nn.Parameter(torch.zeros(size))
    optimizer = bitsandbytes.optim.AdamW8bit([weight], lr=1e-3)
    weight.grad = torch.ones(size)
    optimizer.step()
    tables = ("qmap1", "qmap2")  # the two code tables are shared by all tensors
    state = {key: value for key, value in optimizer.state[weight].items() if torch.is_tensor(value)}
    held = sum(value.nbytes for key, value in state.items() if key not in tables)
    assert held == optimizer_bytes(size, "adamw8bit") == optimizer_bytes(size, "paged-adamw8bit")
    assert optimizer_bytes(size, "adamw") == 8 * size


def moment(settings: Settings, model: str = "llama-3.1-8b", budget: MemoryBudget = CUDA, **fields: Any) -> str:
    """Which of the three moments is the worst."""
    marks = {"loss chunk": "loss", "final norm's gradients": "norm", "layer gradients": "layer"}
    names = ledger(model, settings, budget, **fields)
    return next(marks[name] for name in names if name in marks)


def test_the_worst_moment_decides() -> None:
    assert moment(SETTINGS) == "layer"
    assert moment(replace(SETTINGS, recompute="none", max_seq_len=64), "qwen2.5-0.5b", quant="none") == "loss"
    assert moment(replace(SETTINGS, recompute="none", max_seq_len=2**15), "llama-2-7b", quant="none") == "norm"


def test_no_tensor_of_all_tokens_by_vocabulary() -> None:
    settings = replace(SETTINGS, recompute="none", max_seq_len=4096)
    chunk = ledger("qwen2.5-0.5b", settings, quant="none")["loss chunk"]
    rows = 64 * 2**20 // (4 * 151_936)
    assert chunk.bytes == rows * (151_936 * 6 + 2 * 896 * 2) and chunk.formula.startswith(f"{rows} rows")


def test_a_short_batch_makes_a_small_chunk_and_a_huge_vocabulary_still_sixteen_rows() -> None:
    config = {**LAYER, "model_type": "llama", "vocab_size": 4_000_000}
    spec = spec_from_config(config, "wide")
    for tokens, rows in ((8, 8), (512, 16)):
        settings = replace(SETTINGS, max_seq_len=tokens, dtype="fp32")
        lines = make_ledger(spec, make_recipe({}), settings, CPU)
        assert {line.what: line.bytes for line in lines}["loss chunk"] == rows * (4_000_000 * 4 + 2 * 64 * 4)


@pytest.mark.parametrize("recompute", ["none", "mlp", "layer"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_more_of_anything_never_takes_less(recompute: Any, dtype: Any, optimizer: str) -> None:
    """Exhaustive over a small grid; the random form is in test_plan."""

    def peak(tokens: int, rank: int, layers: int) -> int:
        spec = spec_from_config({**LAYER, "model_type": "llama", "num_hidden_layers": layers}, "m")
        settings = Settings(tokens, 1, 1, dtype, recompute, False, optimizer, 1e-4)
        return gpu_bytes(make_ledger(spec, make_recipe({"lora_r": rank}), settings, CUDA))

    grid = [(8, 8, 1), (64, 8, 1), (64, 32, 1), (64, 32, 5), (4096, 32, 5), (4096, 300, 5), (4096, 300, 9)]
    peaks = [peak(*point) for point in grid]
    assert peaks == sorted(peaks) and len(set(peaks)) == len(peaks)
