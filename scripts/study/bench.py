"""A small real model, text for it, and the few acts that a study repeats: prune, train, recover, score."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from effitrain.adapters.attach import attach
from effitrain.adapters.base import Adapter, AdapterConfig, Clock
from effitrain.adapters.storage import AdapterBundle, load_into
from effitrain.core.cut import cut_widths
from effitrain.core.keep import KeepMap
from effitrain.core.methods import CHANGES_MODEL, WEIGHTS, adapter_kind
from effitrain.core.recipe import make_recipe
from effitrain.data.batches import Batches
from effitrain.data.tokenized import TokenSet
from effitrain.evals.perplexity import evaluate_loss
from effitrain.model.decoder import Decoder, build
from effitrain.model.load import fill, find_base
from effitrain.model.walk import Walk
from effitrain.pruning.align import Aligner
from effitrain.pruning.cut import CutWeights
from effitrain.pruning.groups import PARTS
from effitrain.pruning.score import score_layers
from effitrain.pruning.select import select
from effitrain.quant.read import Weights
from effitrain.train.hooks import Hook
from effitrain.train.loop import Course, train
from effitrain.train.optim import make_optimizer
from effitrain.train.state import TrainState
from effitrain.train.trainable import make_trainable

LORA = AdapterConfig(r=8, alpha=16)
CPU = torch.device("cpu")
EXEMPT = (1, 1)


@dataclass(frozen=True)
class Cut:
    """How a model is pruned; ``parts`` and ``score`` as on the command line."""

    ratio: float
    score: str = "wanda"
    parts: str = "ffn"
    align: str = "none"


class Bench:
    """stories3M with texts to train and to test on.

    Args:
        model: its folder.
        train_texts: joined and cut into rows; every token is trained.
        test_texts: likewise.
        test_rows: how many of those are scored; all where it is None.
        rows, length: of a training step, and tokens of each.
    """

    def __init__(
        self, model: Path, train_texts: Iterable[str], test_texts: Iterable[str], test_rows: int | None, rows: int,
        length: int,
    ):  # fmt: skip
        self.rows, self.length = rows, length
        self.base = find_base(str(model)).fetched()
        self.spec, self.weights = self.base.spec, self.base.weights()
        self.tokenizer = self.base.tokenizer()
        self.train_set, self.test_set = self._rows(train_texts, None), self._rows(test_texts, test_rows)

    def decoder(self, keep: KeepMap | None = None, weights: Weights | None = None) -> Decoder:
        """The model, or the small one that ``keep`` leaves."""
        return fill(self._empty(keep), weights or self.weights, "none", torch.float32, CPU)

    def pruned(self, how: Cut, seed: int) -> tuple[KeepMap, CutWeights]:
        """What is kept, and the weights of the small model."""
        widths = cut_widths(self.spec, how.ratio, how.parts, EXEMPT, multiple=1)
        parts = [PARTS[name] for name in how.parts.split("+")]
        layers = range(EXEMPT[0], self.spec.num_layers - EXEMPT[1])
        scores = score_layers(how.score, self._walk(None, self.weights), layers, parts, seed, self._calibration)
        keep = KeepMap.of(self.spec, select(self.spec, widths, scores), self.base.name, self.weights.fingerprint())
        cut = CutWeights(self.weights, self.spec, keep)
        if how.align == "none":
            return keep, cut
        aligner = Aligner(self._walk(None, self.weights), self._walk(keep, cut), keep, self._calibration)
        return keep, CutWeights(self.weights, self.spec, keep, aligner)

    def fit(
        self, decoder: Decoder, steps: int, seed: int, lr: float, warmup: float, hooks: Sequence[Any] = (),
        config: AdapterConfig = LORA,
    ) -> dict[str, Adapter]:  # fmt: skip
        """Train a LoRA on ``decoder``; ``warmup`` is a share of the steps, a hook is made from (decoder, adapters)."""
        adapters = attach(decoder, config, Clock(seed))
        parameters = [p for p in decoder.parameters() if p.requires_grad]
        optimizer = make_optimizer("adamw", parameters, lr, 0.0)
        batches = Batches(self.train_set, self.rows, self.length, False, seed)
        course = Course(steps, steps, 1, lr, "cosine", warmup)
        made: list[Hook] = [make(decoder, adapters) for make in hooks]
        train(decoder, batches, optimizer, course, TrainState(), Clock(seed), made)
        return adapters

    def tune(self, steps: int, seed: int, **fields: Any) -> float:
        """The test loss after training with a method of ``run`` on unquantised weights; adapters have rank 8 where none
        is given.
        """
        rank = {} if fields["method"] in CHANGES_MODEL else {"lora_r": 8, **fields}
        scale = {"lora_alpha": 16} if adapter_kind(fields["method"]) and fields["method"] not in WEIGHTS else {}
        tables = {"lisa_train_embeddings": False} if fields["method"] == "lisa" else {}
        recipe = make_recipe({"quant": "none", "dtype": "fp32", "seed": seed, **fields, **rank, **scale, **tables})
        decoder = self.decoder()
        made = make_trainable(decoder, recipe, Clock(seed), lambda: self.weights)
        optimizer = make_optimizer("adamw", made.parameters, fields["lr"], 0.0)
        hooks: list[Hook] = []
        if made.lisa:
            made.lisa.optimizer = optimizer
            made.lisa.begin(0)
            hooks.append(made.lisa)
        course = Course(steps, steps, 1, fields["lr"], "cosine", warmup=1 / 6)
        batches = Batches(self.train_set, self.rows, self.length, False, seed)
        train(decoder, batches, optimizer, course, TrainState(), Clock(seed), hooks)
        if made.lisa:
            made.lisa.end()
        return self.loss(decoder)

    def loss(self, decoder: Decoder) -> float:
        """On the test rows."""
        return evaluate_loss(decoder, Batches(self.test_set, 25, self.length, False, 0)).loss

    def loss_with(self, factors: dict[str, Any]) -> float:
        """Of the full-size model with an adapter."""
        decoder = self.decoder()
        load_into(attach(decoder, LORA, Clock()), AdapterBundle(LORA, "", factors), "the recovered adapter")
        return self.loss(decoder)

    @cached_property
    def _calibration(self) -> list[Any]:
        """64 rows."""
        batches = Batches(self.train_set, 8, self.length, False, 7)
        return [batches.get(index) for index in range(8)]

    def _empty(self, keep: KeepMap | None) -> Decoder:
        spec = self.spec.resized(keep.widths) if keep else self.spec
        return build(spec, self.base.source.config, self.base.name)

    def _walk(self, keep: KeepMap | None, weights: Weights) -> Walk:
        return Walk(self._empty(keep), weights, "none", torch.float32, CPU)

    def _rows(self, texts: Iterable[str], rows: int | None) -> TokenSet:
        ids = [token for text in texts for token in self.tokenizer(text, verbose=False)["input_ids"]]
        count = len(ids) // self.length if rows is None else min(rows, len(ids) // self.length)
        array = np.array(ids[: count * self.length], dtype=np.int32)
        return TokenSet(array, array.copy(), np.arange(0, count * self.length + 1, self.length))


def alpaca(data: Path) -> list[str]:
    """Instructions with their answers, as text."""
    rows = json.loads((data / "instruct/alpaca/alpaca_2000.json").read_text(encoding="utf-8"))
    return [f"{row['instruction']}\n{row['input']}\n{row['output']}\n" for row in rows]


def gsm8k(data: Path, part: str) -> list[str]:
    """Questions with their answers, as text."""
    lines = (data / f"instruct/gsm8k/{part}.jsonl").read_text(encoding="utf-8").splitlines()
    return [f"Question: {row['question']}\nAnswer: {row['answer']}\n" for row in map(json.loads, lines)]


def stories(data: Path, part: str) -> list[str]:
    """TinyStories, one text each."""
    lines = (data / f"corpora/tinystories/{part}_stories.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]
