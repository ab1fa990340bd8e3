"""Trials of a training step, for the doctor: each would fail if a known mistake of others were made here.

Where the step is compared with itself done in another way, it runs where training would.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from effitrain.adapters.attach import attach
from effitrain.adapters.base import AdapterConfig, Clock
from effitrain.adapters.merge import merge
from effitrain.adapters.storage import AdapterBundle
from effitrain.core.placement import place
from effitrain.data.batches import Batches, MicroBatch
from effitrain.data.tokenized import IGNORE, TokenSet
from effitrain.evals.trial_model import CONFIG, CPU, Outcome, compared, fresh, here, spec, tokens, uniform, weights
from effitrain.io.atomic import write_json
from effitrain.io.checkpoint import open_checkpoint
from effitrain.model.decoder import Decoder
from effitrain.model.load import stream
from effitrain.quant.nf4 import dequantize, quantize
from effitrain.quant.read import DTYPES
from effitrain.stream.fresh import FreshLayers
from effitrain.train.loop import accumulate

LENGTHS = (17, 5, 9, 12)
GROUP = 8  # tokens that shifted attention lets see each other
SMALL_UPDATE = 0.01  # of the weights, as fine-tuning changes them
KEPT = 0.25  # bf16 rounds weights by about 0.001 of themselves, a tenth of such an update; NF4 by 0.09, nine times it


def streamed_gradients() -> Outcome:
    """Layers that take turns in one slot, which is overwritten between forward and backward: loss and every gradient
    must be those of resident layers, bit for bit.
    """
    device, _ = here()
    resident, streamed = (_step(_model(slots), [_batch(0, 1), _batch(2, 3)]) for slots in (0, 1))
    same = sum(torch.equal(a, b) for a, b in zip(resident, streamed, strict=True))
    return same == len(resident), f"on {device.type}, {same} of {len(resident)} equal those of resident layers"


def training_after_evaluation() -> Outcome:
    """An evaluation between two equal steps must change no gradient."""
    decoder, batch = _model(), _batch(0, 1)
    before = _step(decoder, [batch])
    with torch.no_grad():
        decoder.eval()(batch.input_ids, batch.position_ids, batch.segments)
    same = all(map(torch.equal, before, _step(decoder, [batch])))
    return same, "a step after an evaluation " + ("equals the one before" if same else "differs from the one before")


def accumulated_gradients() -> Outcome:
    """Samples with unequal numbers of trained tokens, in one micro-batch and in two."""
    decoder = _model(device=CPU, dtype=torch.float32)
    return compared("gradients", _step(decoder, [_batch(0, 1)]), _step(decoder, [_batch(0), _batch(1)]))


def precision_of_frozen_weights() -> Outcome:
    """A model in NF4 and bf16, ready to train: no frozen matrix may lie in memory in fp32."""
    decoder = _model(device=CPU, dtype=torch.bfloat16)
    held = [getattr(module, "weight", None) for module in decoder.modules()]  # frozen ones are plain attributes
    frozen = [w for w in (*held, *decoder.buffers()) if isinstance(w, Tensor) and not w.requires_grad]
    wide = [tuple(w.shape) for w in frozen if w.dtype == torch.float32 and w.dim() > 1]
    return not wide, f"frozen matrices of shapes {wide} are in fp32" if wide else "frozen matrices are in NF4 and bf16"


@torch.no_grad()
def shifted_attention() -> Outcome:
    """Change the last tokens of a sample in training with shifted attention: no token before may notice."""
    decoder, ids, changed = fresh("nf4", *here()).train(), tokens(3 * GROUP - 1), 2 * GROUP
    decoder.set_shifted_group(GROUP)
    other = torch.cat([ids[:changed], (ids[changed:] + 1) % CONFIG["vocab_size"]])
    before, after = (decoder(row, torch.arange(len(ids)), (len(ids),)) for row in (ids, other))
    leaked = [i for i in range(changed) if not torch.equal(before[i], after[i])]
    noticed = not torch.equal(before[changed:], after[changed:])
    return noticed and not leaked, f"tokens before the change that saw it: {leaked or 'none'}"


@torch.no_grad()
def merged_update() -> Outcome:
    """A small update merged into 16-bit weights must be there afterwards; in NF4 it would drown."""
    path, base, config = "model.layers.0.mlp.up_proj", weights("none", torch.bfloat16), AdapterConfig(r=4, alpha=4)
    weight = base.read(f"{path}.weight").float()
    left, right = uniform(weight.shape[0], 4), uniform(4, weight.shape[1])
    left *= SMALL_UPDATE * weight.norm() / (left @ right).norm()
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "base", Path(folder) / "merged"
        source.mkdir()
        save_file({name: base.read(name) for name in base.names()}, source / "model.safetensors")
        write_json(source / "config.json", CONFIG)
        merge(source, open_checkpoint(source), AdapterBundle(config, "trial", {path: (left, right)}), target, CONFIG)
        (file,) = target.glob("*.safetensors")
        merged = load_file(file)[f"{path}.weight"].float()
    wanted = weight + left @ right
    ours, in_nf4 = (((w - wanted).norm() / (left @ right).norm()).item() for w in (merged, _through_nf4(wanted)))
    return ours < KEPT, f"an update of 1 % of the weights arrives off by {ours:.2f} of itself; in NF4 by {in_nf4:.1f}"


STEP_TRIALS: Mapping[str, Callable[[], Outcome]] = {
    "streamed gradients": streamed_gradients,
    "training after evaluation": training_after_evaluation,
    "accumulated gradients": accumulated_gradients,
    "precision of frozen weights": precision_of_frozen_weights,
    "shifted attention": shifted_attention,
    "merged update": merged_update,
}


def _model(slots: int = 0, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Decoder:
    """The model in NF4 with adapters that change it, its layers computed again; with ``slots`` all of them stream."""
    device, dtype = device or here()[0], dtype or here()[1]
    layers = CONFIG["num_hidden_layers"]
    placement = place(layers, 0 if slots else layers, max(slots, 1))
    decoder = fresh("nf4", device, dtype, placement.streamed)
    name = next(name for name, known in DTYPES.items() if known == dtype)
    stream(decoder, FreshLayers(spec(), weights("nf4", dtype), "nf4", name, device), placement, device)
    decoder.set_recompute("layer")
    for adapter in attach(decoder, AdapterConfig(r=4), Clock(0)).values():
        left, right = adapter.factors()
        adapter.load_factors(uniform(*left.shape), right)
    return decoder


def _batch(*samples: int) -> MicroBatch:
    """A micro-batch of some of four samples, the first third of each masked."""
    ids = tokens(sum(LENGTHS)).int().numpy()
    labels, start = ids.copy(), 0
    for length in LENGTHS:
        labels[start : start + length // 3] = IGNORE
        start += length
    offsets = np.cumsum([0, *LENGTHS])
    return Batches(TokenSet(ids, labels, offsets), 1, max(LENGTHS), False, 0).gather(np.array(samples))


def _step(decoder: Decoder, micro: Sequence[MicroBatch]) -> list[Tensor]:
    """The loss of a step, and the gradient of every adapter's tensor."""
    parameters = [p for p in decoder.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = None
    loss = accumulate(decoder.train(), micro, Clock(0), parameters)
    return [torch.tensor(loss), *(p.grad for p in parameters if p.grad is not None)]


def _through_nf4(weight: Tensor) -> Tensor:
    return dequantize(quantize(weight), torch.float32)
