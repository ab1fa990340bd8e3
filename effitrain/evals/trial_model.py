"""The random model that the doctor's trials share: a few small layers, made in memory, the same every time."""

from typing import Any

import torch
from torch import Tensor

from effitrain.core.spec import ModelSpec, spec_from_config
from effitrain.io.synthetic import SyntheticCheckpoint, shapes_of
from effitrain.model.decoder import Decoder, build
from effitrain.model.load import fill

Outcome = tuple[bool | None, str]

# fp32 sums of up to 112 products in another order differ by some 1e-6 of the largest result.
TOLERANCE = 1e-5
CPU = torch.device("cpu")
VOCAB = 211
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def here() -> tuple[torch.device, torch.dtype]:
    """Where training would run: the card in bf16, or the CPU in fp32."""
    return (torch.device("cuda"), torch.bfloat16) if torch.cuda.is_available() else (CPU, torch.float32)


def spec() -> ModelSpec:
    """Its shape."""
    return spec_from_config(CONFIG, "trial")


def weights(quant: str, dtype: torch.dtype) -> SyntheticCheckpoint:
    """Its tensors, linears in NF4 where ``quant`` says so."""
    return SyntheticCheckpoint(shapes_of(spec()), 0, quant == "nf4", dtype)


def fresh(
    quant: str = "none", device: torch.device = CPU, dtype: torch.dtype = torch.float32, streamed: tuple[int, ...] = ()
) -> Decoder:
    """The model without adapters, in evaluation mode; layers in ``streamed`` have no weights yet."""
    empty = build(spec(), CONFIG, "trial")
    return fill(empty, weights(quant, dtype), quant, dtype, device, streamed=streamed).eval()


def tokens(count: int) -> Tensor:
    """Random token ids, int64 [count]."""
    return torch.randint(VOCAB, (count,), generator=torch.Generator().manual_seed(0))


def uniform(*shape: int) -> Tensor:
    """Random numbers of mean 0, one apart at most."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) - 0.5


def compared(what: str, ours: list[Tensor], theirs: list[Tensor]) -> Outcome:
    """The largest difference between two lists of tensors, as a share of each tensor's largest value."""
    pairs = zip(ours, theirs, strict=True)
    error = torch.stack([(a - b).abs().max() / b.abs().max() for a, b in pairs]).max().item()  # NaN if there is one
    return error <= TOLERANCE, f"{what} differ by {error:.1e} of the largest, allowed {TOLERANCE:.0e}"
