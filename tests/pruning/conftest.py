"""Small random models, as decoders of ours and as stock ones, and calibration text for them."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from effitrain.core.keep import KeepMap, LayerKeep
from effitrain.data.batches import Batches
from effitrain.data.tokenized import TokenSet
from effitrain.model.decoder import build
from effitrain.model.load import find_base
from effitrain.model.walk import Walk

CPU = torch.device("cpu")


@dataclasses.dataclass
class Model:
    """A random model: where it lies, and ways to have it."""

    folder: object

    @property
    def base(self):
        return find_base(str(self.folder))

    @property
    def spec(self):
        return self.base.spec

    @property
    def weights(self):
        return self.base.fetched().weights()

    def empty(self, spec=None):
        return build(spec or self.spec, self.base.source.config, "small")

    def walk(self):
        return Walk(self.empty(), self.weights, "none", torch.float32, CPU)

    def stock(self):
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32, attn_implementation="eager")


@pytest.fixture
def model(tiny_model):
    """``model(family, heads=..., ...)``."""
    return lambda *args, **sizes: Model(tiny_model(*args, **sizes))


@pytest.fixture
def text():
    """``text(n)``: n micro-batches of two samples of different lengths, every token trained."""

    def make(count, vocab=261):
        lengths = np.tile([17, 9], count)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        ids = np.random.default_rng(3).integers(0, vocab, offsets[-1]).astype(np.int32)
        batches = Batches(TokenSet(ids, ids.copy(), offsets), 2, 32, False, 0)
        return [batches.get(index) for index in range(count)]

    return make


@pytest.fixture
def uneven():
    """``uneven(spec)``: a keep map whose layers differ: some whole, some with a random part of channels and heads."""

    def make(spec, seed=0, base="full", fingerprint="print"):
        random = np.random.default_rng(seed)
        layers = []
        for index in range(spec.num_layers):
            ffn = random.integers(1, spec.ffn) if index != 1 else spec.ffn
            kv = random.integers(1, spec.num_kv_heads + 1)
            layers.append(
                LayerKeep(
                    *(
                        tuple(sorted(random.choice(n, k, replace=False).tolist()))
                        for n, k in ((spec.ffn, ffn), (spec.num_kv_heads, kv))
                    )
                )
            )
        return KeepMap.of(spec, layers, base, fingerprint)

    return make


def mask(stock, keep):
    """Zero in a stock model what ``keep`` drops: rows of up, columns of o; nothing is removed."""
    group = keep.num_heads // keep.num_kv_heads * keep.head_dim
    with torch.no_grad():
        for layer, kept in zip(stock.model.layers, keep.layers, strict=True):
            gone = sorted(set(range(keep.ffn)) - set(kept.ffn))
            layer.mlp.up_proj.weight[gone] = 0
            for head in sorted(set(range(keep.num_kv_heads)) - set(kept.kv_heads)):
                layer.self_attn.o_proj.weight[:, head * group : (head + 1) * group] = 0
    return stock


def stock_logits(stock, batch):
    """Logits of each sample of a micro-batch by itself."""
    with torch.no_grad():
        parts = [stock(input_ids=ids[None]).logits[0] for ids in batch.input_ids.split(list(batch.segments))]
    return torch.cat(parts)


@pytest.fixture
def inputs_of():
    """``inputs_of(stock, batches)``: inputs of every linear of a stock model's layers over all samples, [tokens, in],
    by path.
    """

    def of(stock, batches):
        inputs = {}
        handles = [
            module.register_forward_pre_hook(
                lambda m, a, name=name: inputs.setdefault(name, []).append(a[0][0].detach())
            )
            for name, module in stock.named_modules()
            if name.endswith("_proj")
        ]
        with torch.no_grad():
            for batch in batches:
                for ids in batch.input_ids.split(list(batch.segments)):
                    stock(input_ids=ids[None])
        for handle in handles:
            handle.remove()
        return {name: torch.cat(parts) for name, parts in inputs.items()}

    return of
