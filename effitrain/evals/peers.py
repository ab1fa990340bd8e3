"""Other libraries in the place of our kernels, for the benchmarks: bitsandbytes, peft, liger-kernel and Unsloth.

Every contender takes the inputs that ours takes. None is imported before it is built or first called: Unsloth changes
transformers and peft when it is imported, so a process measures it last.
"""

import os
import tempfile
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effitrain.io.atomic import write_json
from effitrain.io.hub import find_model
from effitrain.io.nf4 import NF4Tensor
from effitrain.io.synthetic import SyntheticCheckpoint
from effitrain.io.tokenizer import load_tokenizer
from effitrain.io.writer import write_shards
from effitrain.kernels import nf4_dequantize
from effitrain.kernels.lora_linear import Linear

UNSLOTH = "Unsloth"


def installed(package: str) -> bool:
    """Whether ``package`` is there; importing it may still fail."""
    return find_spec(package) is not None


def stock_values(weight: Any, dtype: torch.dtype) -> Tensor:
    """The values of an NF4 weight by bitsandbytes' two kernels."""
    absmax = torch.ops.bitsandbytes.dequantize_blockwise(
        weight.absmax, weight.nested_absmax, nf4_dequantize.dynamic_code_on(weight.packed.device), 256, torch.float32
    )
    absmax += weight.offset
    return torch.ops.bitsandbytes.dequantize_4bit(weight.packed, absmax, 64, "nf4", list(weight.shape), dtype)


def stock_linear(weight: NF4Tensor, dtype: torch.dtype, bias: nn.Parameter | None = None) -> nn.Module:
    """bitsandbytes' linear over ``weight``, on its device."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    (out, inp), device = weight.shape, weight.packed.device
    state = weight.to_state("weight", dtype)
    linear = Linear4bit(inp, out, bias is not None, dtype, quant_type="nf4", device="meta")
    linear.weight = Params4bit.from_prequantized(state.pop("weight"), state, requires_grad=False, device=device)
    linear.bias = bias  # type: ignore[assignment]
    return linear


def write_checkpoint(folder: Path, weights: SyntheticCheckpoint, config: Mapping[str, Any], dtype: torch.dtype) -> None:
    """NF4 weights as transformers with bitsandbytes stores them, beside a tokenizer, which Unsloth asks for."""
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    owners: dict[str, str] = {}

    def parts(name: str) -> dict[str, Tensor]:
        return weights.read_nf4(name).to_state(name, dtype) if weights.is_nf4(name) else {name: weights.read(name)}

    for name in weights.names():
        for part, tensor in parts(name).items():
            layout[part], owners[part] = (tensor.dtype, tuple(tensor.shape)), name
    write_shards(folder, layout, lambda part: parts(owners[part])[part])
    quantisation = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
                    "bnb_4bit_use_double_quant": True,
                    "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")}  # fmt: skip
    write_json(folder / "config.json", {**config, "quantization_config": quantisation})
    load_tokenizer(find_model("tiny")).save_pretrained(folder)


def adapted(linears: Mapping[str, Linear], dtype: torch.dtype) -> nn.Module:
    """A module with bitsandbytes' linears by name, and peft's LoRA with the same numbers on each."""
    import peft

    module: Any = nn.Module()
    module.is_loaded_in_4bit = True
    for name, linear in linears.items():
        setattr(module, name, stock_linear(linear.base.weight, dtype))  # type: ignore[attr-defined]
    updates = {name: linear.low_rank for name, linear in linears.items()}
    ranks = {name: len(update.A) for name, update in updates.items() if update is not None}
    rank = next(iter(ranks.values()))
    alpha = int(next(update.scale for update in updates.values() if update is not None) * rank)
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(ranks)), module)
    for name, update in updates.items():
        if update is not None:
            stock = getattr(module, name)
            stock.lora_A["default"].weight = nn.Parameter(update.A.detach().clone())
            stock.lora_B["default"].weight = nn.Parameter(update.B.detach().clone())
    return module


def autocast(function: Callable[..., Any], device: torch.device, dtype: torch.dtype) -> Callable[..., Any]:
    """``function`` as transformers' Trainer runs it with ``bf16=True``; else peft computes its share in float32."""

    def call(*args: Any, **named: Any) -> Any:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return function(*args, **named)

    return call


def peft_block(kernel: str, module: Any) -> Callable[[Tensor], Any]:
    """What our ``kernel`` computes, as transformers writes it, through the linears of ``module``."""
    blocks: dict[str, Callable[[Tensor], Any]] = {
        "lora_linear": lambda x: module.o_proj(x),
        "lora_qkv": lambda x: (module.q_proj(x), module.k_proj(x), module.v_proj(x)),
        "lora_mlp": lambda x: module.down_proj(F.silu(module.gate_proj(x)) * module.up_proj(x)),
    }
    return blocks[kernel]


def liger(name: str) -> Callable[..., Any] | None:
    """The function of liger-kernel, where that is installed."""
    if not installed("liger_kernel"):
        return None
    return getattr(import_module("liger_kernel.transformers.functional"), f"liger_{name}")


def liger_rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """liger-kernel's rotation of [B, T, heads, D]."""
    turn = liger("rope")
    assert turn is not None
    return turn(query.transpose(1, 2), key.transpose(1, 2), cos, sin)


def import_unsloth() -> Any:
    """The package, which writes the code that it makes of transformers' classes to a folder of this process alone."""
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", tempfile.mkdtemp())
    return import_module("unsloth")


def unsloth(name: str) -> Callable[..., Any]:
    """The function of Unsloth's kernels, which are imported when it is first called."""

    def call(*args: Any) -> Any:
        import_unsloth()  # first, as it asks for
        return getattr(import_module("unsloth.kernels"), name)(*args)

    return call


def unsloth_values(weight: Tensor) -> Tensor:
    """The values of bitsandbytes' parameter ``weight``."""
    return unsloth("fast_dequantize")(weight, weight.quant_state)  # type: ignore[attr-defined]


def unsloth_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Its norm reads a module's fields."""
    return unsloth("fast_rms_layernorm")(SimpleNamespace(weight=weight, variance_epsilon=eps), x)


def unsloth_swiglu(gate: Tensor, up: Tensor) -> None:
    """Both passes, which its MLP calls itself; the backward one writes into its inputs."""
    gate, up = gate.detach()[None], up.detach()[None]
    product = unsloth("swiglu_fg_kernel")(gate, up)
    unsloth("swiglu_DWf_DW_dfg_kernel")(torch.ones_like(product)[0], gate[0], up[0])


def unsloth_rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Its rotation of [B, T, heads, D]."""
    return unsloth("fast_rope_embedding")(query.transpose(1, 2), key.transpose(1, 2), cos[0], sin[0])


def unsloth_block(kernel: str, module: nn.Module) -> Callable[[Tensor], Any]:
    """The same by its functions, which take the linears of ``module`` apart."""
    names = {"lora_linear": "apply_lora_o", "lora_qkv": "apply_lora_qkv", "lora_mlp": "apply_lora_mlp_swiglu"}
    return lambda x: unsloth(names[kernel])(module, x[None])
