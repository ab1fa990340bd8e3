"""Contenders compute what ours do: peft around the same weights, and Unsloth by calls that a stand-in takes as it does.

The calls were tried with Unsloth 2026.10.9 itself, which trains on a CPU: the same first loss.
"""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from effitrain.evals import bench_cases, bench_kernels, peers
from effitrain.evals.bench_cases import Shapes
from effitrain.evals.bench_step import CONTENDERS, Work, measure
from effitrain.evals.kernels import Maker
from effitrain.evals.peers import UNSLOTH
from effitrain.kernels import lora_linear, lora_mlp, rms_norm, rope
from effitrain.model.load import find_base

CPU = torch.device("cpu")
SMALL = Shapes("small", 64, 128, 2, 1, 32, 300, 24, 4)


def _make():
    return Maker(CPU, torch.float32, torch.Generator().manual_seed(0))


def test_peft_computes_the_same():
    make = _make()
    linears = {"gate_proj": make.linear(128, 64), "up_proj": make.linear(128, 64), "down_proj": make.linear(64, 128)}
    module = peers.adapted(linears, torch.float32)
    x = make.randn(5, 64, trained=True)
    ours, theirs = lora_mlp.reference(x, *linears.values()), peers.peft_block("lora_mlp", module)(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    single = lora_linear.reference(x, linears["gate_proj"])
    torch.testing.assert_close(single, module.gate_proj(x), rtol=1e-5, atol=1e-6)
    wanted = torch.autograd.grad(ours.sum(), linears["up_proj"].low_rank.A)
    found = torch.autograd.grad(theirs.sum(), module.up_proj.lora_A["default"].weight)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.fixture
def unsloth(monkeypatch):
    """A package with Unsloth's functions by name, in plain torch; what is called is noted."""
    called = []

    def noted(function):
        return lambda *args, **kwargs: called.append(function.__name__) or function(*args, **kwargs)

    def fast_dequantize(weight, quant_state):
        import bitsandbytes.functional as bnb

        return bnb.dequantize_4bit(weight, quant_state)

    def apply_lora_o(module, x):
        assert x.dim() == 3
        return module.o_proj(x)

    def apply_lora_qkv(module, x):
        assert x.dim() == 3
        return module.q_proj(x), module.k_proj(x), module.v_proj(x)

    def apply_lora_mlp_swiglu(module, x):
        assert x.dim() == 3
        return peers.peft_block("lora_mlp", module)(x)

    def fast_rms_layernorm(norm, x):
        return rms_norm.reference(x, norm.weight, norm.variance_epsilon)

    def fast_rope_embedding(query, key, cos, sin):
        assert query.shape[1] == SMALL.heads and key.shape[1] == SMALL.kv_heads and cos.dim() == 2
        return tuple(rope.reference(t.transpose(1, 2), cos[None], sin[None]) for t in (query, key))

    def swiglu_fg_kernel(gate, up):
        assert gate.dim() == 3
        return F.silu(gate) * up

    def swiglu_DWf_DW_dfg_kernel(grad, gate, up):
        assert grad.dim() == gate.dim() == 2
        return grad, gate, up

    def fast_cross_entropy_loss(logits, labels):
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    monkeypatch.setenv("UNSLOTH_COMPILE_LOCATION", "")
    package, kernels = ModuleType("unsloth"), ModuleType("unsloth.kernels")
    for function in (
        fast_dequantize, apply_lora_o, apply_lora_qkv, apply_lora_mlp_swiglu, fast_rms_layernorm, fast_rope_embedding,
        swiglu_fg_kernel, swiglu_DWf_DW_dfg_kernel, fast_cross_entropy_loss,
    ):  # fmt: skip
        setattr(kernels, function.__name__, noted(function))
    monkeypatch.setitem(sys.modules, "unsloth", package)
    monkeypatch.setitem(sys.modules, "unsloth.kernels", kernels)
    monkeypatch.setattr(peers, "installed", lambda name: name in ("unsloth", "peft"))
    return SimpleNamespace(package=package, kernels=kernels, called=called)


def test_unsloth_is_timed_last_and_by_every_function(unsloth, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(bench_kernels, "error_of", lambda kernel, device, dtype: 0.0)
    timings = list(bench_kernels.bench(SMALL, CPU, torch.float32))
    theirs = [t for t in timings if t.contender == UNSLOTH]
    assert timings[-len(theirs) :] == theirs and all(t.seconds is not None for t in theirs), theirs
    without = {"nf4_linear", "lora_linear"}  # no such product; a plain weight
    assert {t.kernel for t in theirs} >= {t.kernel for t in timings} - without
    assert set(unsloth.called) == {name for name in vars(unsloth.kernels) if name[0] != "_"}


def test_one_that_cannot_be_imported_is_a_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "unsloth", None)
    monkeypatch.setattr(peers, "installed", lambda name: name == "unsloth")
    case = bench_cases.Case("swiglu", "3", lambda: [torch.ones(3)], {UNSLOTH: peers.unsloth("swiglu_fg_kernel")})
    monkeypatch.setattr(bench_kernels, "cases", lambda *_: iter([case]))
    (timing,) = bench_kernels.bench(SMALL, CPU, torch.float32)
    assert timing.seconds is None and timing.note.startswith("ModuleNotFoundError")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_a_step_of_unsloth_loses_as_ours(unsloth, tiny_model):
    """Its two calls, answered by transformers and peft from the checkpoint in NF4 that it is given."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    class FastLanguageModel:
        @staticmethod
        def from_pretrained(folder, max_seq_length, dtype, load_in_4bit):
            assert load_in_4bit
            return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), AutoTokenizer.from_pretrained(folder)

        @staticmethod
        def get_peft_model(model, r, lora_alpha, target_modules, use_gradient_checkpointing):
            assert use_gradient_checkpointing == "unsloth" and len(target_modules) == 7
            return peft.get_peft_model(
                model, peft.LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=target_modules)
            ).train()

    unsloth.package.FastLanguageModel = FastLanguageModel
    base = find_base(str(tiny_model("llama", ffn=128)), "synthetic")
    work = Work(base, 2, 24, 4, 1, CPU, torch.float32)
    theirs, ours = (measure(contender, work)["losses"] for contender in (UNSLOTH, CONTENDERS[0]))
    assert theirs[0] == pytest.approx(ours[0], rel=1e-4) and theirs[-1] < theirs[0]
