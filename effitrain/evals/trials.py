"""Trials of what training rests on, for the doctor, on the random model of ``trial_model``.

They run where training would, on the card in bf16 or on the CPU in fp32; where numbers are compared with those of other
code, always on the CPU in fp32.
"""

import tempfile
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from effitrain.adapters.attach import attach
from effitrain.adapters.base import AdapterConfig, Clock
from effitrain.adapters.storage import load_into, read_adapter, save_adapter
from effitrain.data.formats import Turn
from effitrain.data.templates import STYLES, find_template, stop_ids
from effitrain.data.tokenized import encode
from effitrain.evals.step_trials import STEP_TRIALS
from effitrain.evals.trial_model import CONFIG, VOCAB, Outcome, compared, fresh, here, tokens, uniform, weights
from effitrain.io.hub import find_model
from effitrain.io.tokenizer import load_tokenizer
from effitrain.kernels import swiglu
from effitrain.kernels.linear_cross_entropy import IGNORED, linear_cross_entropy, reference
from effitrain.model.decoder import Decoder


@torch.no_grad()
def packing_isolation() -> Outcome:
    """Change the tokens of one sample of a packed row: all others must stay as they were, bit for bit."""
    decoder = fresh("nf4", *here())
    lengths = (5, 9, 1, 12)
    samples = tokens(sum(lengths)).split(lengths)
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
        decoder, bundle = fresh(), read_adapter(Path(folder) / "adapter")
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
    base = weights("none", torch.float32)
    stock.load_state_dict({name: base.read(name) for name in base.names()})
    with tempfile.TemporaryDirectory() as folder:
        ours = _adapted_logits(Path(folder) / "adapter")
        theirs = PeftModel.from_pretrained(stock, str(Path(folder) / "adapter")).eval()(tokens(40)[None]).logits[0]
    return compared("logits", [ours], [theirs])


def fused_loss() -> Outcome:
    """Head and loss in chunks against whole logits: the loss and both gradients."""
    hidden, weight = uniform(60, 32).requires_grad_(), uniform(VOCAB, 32).requires_grad_()

    def head(rows: Tensor) -> Tensor:
        return F.linear(rows, weight)

    labels = tokens(60).where(torch.arange(60) % 3 > 0, IGNORED)
    fused = linear_cross_entropy(hidden, head, labels, [weight], chunk_bytes=17 * 4 * VOCAB)
    whole = reference(hidden, head, labels)
    ours, theirs = ([loss, *torch.autograd.grad(loss, [hidden, weight])] for loss in (fused, whole))
    return compared("loss and gradients", ours, theirs)


def fused_swiglu() -> Outcome:
    """SwiGLU against its formula: the output and both gradients."""
    gate, up = uniform(60, 32).requires_grad_(), uniform(60, 32).requires_grad_()
    ours, theirs = (
        [out, *torch.autograd.grad(out.sum(), [gate, up])]
        for out in (swiglu.swiglu(gate, up), swiglu.reference(gate, up))
    )
    return compared("output and gradients", ours, theirs)


TRIALS: Mapping[str, Callable[[], Outcome]] = {
    "packing isolation": packing_isolation,
    "end of turn": end_of_turn,
    "saved adapter": saved_adapter,
    "stock peft": stock_peft,
    "fused loss": fused_loss,
    "fused SwiGLU": fused_swiglu,
    **STEP_TRIALS,
}


def _adapted_logits(folder: Path) -> Tensor:
    """Logits of a model with a random adapter, which is saved to ``folder``."""
    decoder, config = fresh(), AdapterConfig(r=4, alpha=8)
    adapters = attach(decoder, config, Clock(0))
    for adapter in adapters.values():
        left, right = adapter.factors()
        adapter.load_factors(uniform(*left.shape), right)
    save_adapter(folder, {path: adapter.factors() for path, adapter in adapters.items()}, config, "trial")
    return _logits(decoder)


def _logits(decoder: Decoder) -> Tensor:
    return decoder.logits(decoder(tokens(40), torch.arange(40), (40,)))
