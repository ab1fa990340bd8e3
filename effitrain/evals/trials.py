"""Trials of what training rests on, for the doctor: on a random model of two small layers, made in memory.

They run where training would, on the card in bf16 or on the CPU in fp32; where numbers are compared with those of other
code, always on the CPU in fp32.
"""

import tempfile
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from effitrain.adapters.attach import attach
from effitrain.adapters.base import AdapterConfig, Clock
from effitrain.adapters.storage import load_into, read_adapter, save_adapter
from effitrain.core.spec import spec_from_config
from effitrain.data.formats import Turn
from effitrain.data.templates import STYLES, find_template, stop_ids
from effitrain.data.tokenized import encode
from effitrain.io.hub import find_model
from effitrain.io.synthetic import SyntheticCheckpoint, shapes_of
from effitrain.io.tokenizer import load_tokenizer
from effitrain.kernels import swiglu
from effitrain.kernels.linear_cross_entropy import IGNORED, linear_cross_entropy, reference
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
    "num_hidden_layers": 2,
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


@torch.no_grad()
def packing_isolation() -> Outcome:
    """Change the tokens of one sample of a packed row: all others must stay as they were, bit for bit."""
    on_card = torch.cuda.is_available()
    decoder = _decoder("nf4", *((torch.device("cuda"), torch.bfloat16) if on_card else (CPU, torch.float32)))
    lengths = (5, 9, 1, 12)
    samples = _tokens(sum(lengths)).split(lengths)
    positions = torch.cat([torch.arange(length) for length in lengths])
    before = decoder(torch.cat(samples), positions, lengths).split(lengths)
    for k in range(len(samples)):
        changed = [(ids + 1) % VOCAB if i == k else ids for i, ids in enumerate(samples)]
        after = decoder(torch.cat(changed), positions, lengths).split(lengths)
        same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        if same != [i != k for i in range(len(samples))]:
            return False, f"after a change of sample {k + 1} of {len(samples)}, the samples that stayed: {same}"
    return True, f"on {decoder.device.type}, {len(lengths)} samples in a row do not see each other"


def end_of_turn() -> Outcome:
    """With the built-in tokenizer, in every template: the answer and its end mark are trained, the prompt is not."""
    tokenizer = load_tokenizer(find_model("tiny"))
    turns = [Turn("user", "What is the colour of the sky?"), Turn("assistant", "It is blue.")]
    for name in ("auto", *STYLES):
        template = find_template(name, tokenizer)
        (sample,) = encode(tokenizer, template.render(turns, "The trial"))
        trained = sample.ids[sample.trained].tolist()
        text = tokenizer.decode(trained)
        if not stop_ids(template, tokenizer) & set(trained) or "It is blue." not in text or "sky" in text:
            return False, f"template {name} trains on {text!r}"
    return True, f"trained in the templates auto, {', '.join(STYLES)}"


@torch.no_grad()
def saved_adapter() -> Outcome:
    """An adapter saved and loaded into a fresh model must give the same logits, bit for bit."""
    with tempfile.TemporaryDirectory() as folder:
        logits = _adapted_logits(Path(folder) / "adapter")
        decoder, bundle = _decoder(), read_adapter(Path(folder) / "adapter")
        load_into(attach(decoder, bundle.config, Clock(1)), bundle, folder)
    return torch.equal(_logits(decoder), logits), "saved and loaded, logits compared with those before"


@torch.no_grad()
def stock_peft() -> Outcome:
    """Stock transformers with stock peft must give our logits from an adapter that we saved."""
    if find_spec("peft") is None:
        return None, "peft is not installed, optional"
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIG))
    weights = _weights("none", torch.float32)
    stock.load_state_dict({name: weights.read(name) for name in weights.names()})
    with tempfile.TemporaryDirectory() as folder:
        ours = _adapted_logits(Path(folder) / "adapter")
        theirs = PeftModel.from_pretrained(stock, str(Path(folder) / "adapter")).eval()(_tokens(40)[None]).logits[0]
    return _compared("logits", [ours], [theirs])


def fused_loss() -> Outcome:
    """Head and loss in chunks against whole logits: the loss and both gradients."""
    hidden, weight = _uniform(60, 32).requires_grad_(), _uniform(VOCAB, 32).requires_grad_()

    def head(rows: Tensor) -> Tensor:
        return F.linear(rows, weight)

    labels = _tokens(60).where(torch.arange(60) % 3 > 0, IGNORED)
    fused = linear_cross_entropy(hidden, head, labels, [weight], chunk_bytes=17 * 4 * VOCAB)
    whole = reference(hidden, head, labels)
    ours, theirs = ([loss, *torch.autograd.grad(loss, [hidden, weight])] for loss in (fused, whole))
    return _compared("loss and gradients", ours, theirs)


def fused_swiglu() -> Outcome:
    """SwiGLU against its formula: the output and both gradients."""
    gate, up = _uniform(60, 32).requires_grad_(), _uniform(60, 32).requires_grad_()
    ours, theirs = (
        [out, *torch.autograd.grad(out.sum(), [gate, up])]
        for out in (swiglu.swiglu(gate, up), swiglu.reference(gate, up))
    )
    return _compared("output and gradients", ours, theirs)


TRIALS: Mapping[str, Callable[[], Outcome]] = {
    "packing isolation": packing_isolation,
    "end of turn": end_of_turn,
    "saved adapter": saved_adapter,
    "stock peft": stock_peft,
    "fused loss": fused_loss,
    "fused SwiGLU": fused_swiglu,
}


def _weights(quant: str, dtype: torch.dtype) -> SyntheticCheckpoint:
    return SyntheticCheckpoint(shapes_of(spec_from_config(CONFIG, "trial")), 0, quant == "nf4", dtype)


def _decoder(quant: str = "none", device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> Decoder:
    empty = build(spec_from_config(CONFIG, "trial"), CONFIG, "trial")
    return fill(empty, _weights(quant, dtype), quant, dtype, device).eval()


def _adapted_logits(folder: Path) -> Tensor:
    """Logits of a model with a random adapter, which is saved to ``folder``."""
    decoder, config = _decoder(), AdapterConfig(r=4, alpha=8)
    adapters = attach(decoder, config, Clock(0))
    for adapter in adapters.values():
        left, right = adapter.factors()
        adapter.load_factors(_uniform(*left.shape), right)
    save_adapter(folder, {path: adapter.factors() for path, adapter in adapters.items()}, config, "trial")
    return _logits(decoder)


def _logits(decoder: Decoder) -> Tensor:
    return decoder.logits(decoder(_tokens(40), torch.arange(40), (40,)))


def _tokens(count: int) -> Tensor:
    return torch.randint(VOCAB, (count,), generator=torch.Generator().manual_seed(0))


def _uniform(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) - 0.5


def _compared(what: str, ours: list[Tensor], theirs: list[Tensor]) -> Outcome:
    """The largest difference between two lists of tensors, as a share of each tensor's largest value."""
    pairs = zip(ours, theirs, strict=True)
    error = torch.stack([(a - b).abs().max() / b.abs().max() for a, b in pairs]).max().item()  # NaN if there is one
    return error <= TOLERANCE, f"{what} differ by {error:.1e} of the largest, allowed {TOLERANCE:.0e}"
