"""LongLoRA in small: stories3M, made for 512 positions, learns to use 2,048 on novels.

The text is War and Peace and Moby-Dick, joined and cut into rows of 2,048 tokens; the last tenth of each book is held
out. Two arms train a LoRA with norms and embedding rows on positions divided by four, the same rows in the same order:
one with shifted sparse attention in groups of 512, one with full attention. Both are scored with full attention, by
position. The untouched model is scored beside them, with its own positions and with divided ones.

    EFFITRAIN_DATA=DIR python scripts/study_longlora.py -o docs            about 12 minutes on one core
    EFFITRAIN_DATA=DIR python scripts/study_longlora.py -o OUT --quick     half a minute, a few steps of 512 tokens
"""

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from effitrain.adapters.base import Clock
from effitrain.core.choices import group_of
from effitrain.core.recipe import Recipe
from effitrain.data.batches import Batches
from effitrain.data.tokenized import TokenSet
from effitrain.model.decoder import Decoder
from effitrain.model.load import find_base, load_model
from effitrain.planning import at_positions, recipe
from effitrain.train.loop import Course, train
from effitrain.train.optim import make_optimizer
from effitrain.train.state import TrainState
from effitrain.train.trainable import make_trainable

BOOKS = ("war_and_peace_2600", "moby_dick_2701")
LENGTH, ROWS, BUCKETS, HELD_OUT = 2048, 4, 8, 0.1
ARMS = {
    "untouched": {"rope_scaling": "none"},
    "positions divided, untrained": {},
    "trained, full attention": {"train_norms": True, "train_embeddings": True},
    "trained, s2": {"train_norms": True, "train_embeddings": True, "attention": "s2"},
}


def main() -> None:
    """Run the arms; JSON after each, then table and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--scaling", default="linear", choices=["linear", "ntk", "yarn"])
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    data = Path(os.environ["EFFITRAIN_DATA"])
    model = data / "models/stories3M"
    steps, length, rows = (3, 768, 4) if asked.quick else (asked.steps, LENGTH, 32)
    held, taught = books(data, model, length, rows)
    facts = {"model": "stories3M", "length": length, "known": 512, "steps": steps, "lr": asked.lr, "rows": ROWS}
    study: dict[str, Any] = {**facts, "scaling": asked.scaling, "held_out_rows": len(held), "arms": {}}
    asked.output.mkdir(parents=True, exist_ok=True)
    for name, fields in ARMS.items():
        started = time.process_time()
        ways = {"rope_scaling": asked.scaling, "lr": asked.lr, **fields}
        decoder = arm(recipe(model=str(model), quant="none", dtype="fp32", max_seq_len=length, **ways), taught, steps)
        losses = loss_by_position(decoder, held, BUCKETS)
        study["arms"][name] = {"losses": losses, "seconds": round(time.process_time() - started)}
        (asked.output / "study_longlora.json").write_text(json.dumps(study, indent=1) + "\n")
        print(f"{name}: {' '.join(f'{loss:.3f}' for loss in losses)}, {study['arms'][name]['seconds']} s", flush=True)
    print(table(study))
    plot(study, asked.output / "study_longlora.png")


def books(data: Path, model: Path, length: int, rows: int) -> tuple[TokenSet, TokenSet]:
    """The held-out ends of the books, ``rows`` rows evenly spaced, and their beginnings; every token is trained."""
    tokenizer = find_base(str(model)).tokenizer()
    held: list[np.ndarray[Any, Any]] = []
    taught: list[np.ndarray[Any, Any]] = []
    for book in BOOKS:
        text = (data / f"corpora/books/{book}.txt").read_text(encoding="utf-8")
        ids = np.array(tokenizer(text, verbose=False)["input_ids"], np.int32)
        edge = int(len(ids) * (1 - HELD_OUT))
        for part, kept in ((ids[edge:], held), (ids[:edge], taught)):
            kept += np.split(part[: len(part) // length * length], len(part) // length)
    return _set(held[:: max(1, len(held) // rows)][:rows]), _set(taught)


def arm(asked: Recipe, taught: TokenSet, steps: int) -> Decoder:
    """The model as ``asked`` says; trained where it asks for that."""
    base = find_base(asked.model).fetched()
    asked, config = at_positions(asked, base.source.config)
    length = asked.max_seq_len or 0
    decoder = load_model(base.at_positions(config), asked, torch.device("cpu"))
    if not asked.train_norms:
        return decoder
    clock = Clock(asked.seed)
    make_trainable(decoder, asked.changed(s2_group=group_of(asked, length), lora_r=8, lora_alpha=16), clock)
    trained = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
    lr = asked.lr or 0.0
    batches = Batches(taught, ROWS, length, False, asked.seed)
    course = Course(steps, steps, 1, lr, "cosine", warmup=0.1)
    train(decoder, batches, make_optimizer("adamw", trained, lr, 0.0), course, TrainState(), clock)
    return decoder


@torch.no_grad()
def loss_by_position(decoder: Decoder, rows: TokenSet, buckets: int) -> list[float]:
    """Mean loss of the tokens in each of ``buckets`` equal parts of the length, with full attention."""
    decoder.eval()
    total = []
    for row in torch.from_numpy(rows.input_ids.astype(np.int64)).split(rows.lengths.tolist()):
        logits = decoder.logits(decoder(row, torch.arange(len(row)), [len(row)]))
        losses = F.cross_entropy(logits[:-1], row[1:], reduction="none")
        total.append(torch.cat([losses[:1], losses]))  # nothing predicts the first token
    return torch.stack(total).mean(0).unflatten(0, (buckets, -1)).mean(1).tolist()


def table(study: Mapping[str, Any]) -> str:
    """Losses by position, as Markdown."""
    width = study["length"] // BUCKETS
    heads = [f"{start:,}-{start + width:,}" for start in range(0, study["length"], width)]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (BUCKETS + 1) + "|"]
    for name, found in study["arms"].items():
        lines.append(f"| {name} | {' | '.join(f'{loss:.3f}' for loss in found['losses'])} |")
    return "\n".join(lines)


def plot(study: Mapping[str, Any], path: Path) -> None:
    """Loss against position."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    width = study["length"] // BUCKETS
    for name, found in study["arms"].items():
        axes.plot([(n + 0.5) * width for n in range(BUCKETS)], found["losses"], "o-", label=name)
    axes.axvline(study["known"], linestyle=":", color="grey")
    axes.set(xlabel="position in the row", ylabel="loss on held-out text", title="stories3M, made for 512 positions")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _set(rows: Sequence[Any]) -> TokenSet:
    ids, length = np.concatenate(rows), len(rows[0])
    return TokenSet(ids, ids.copy(), np.arange(0, len(ids) + 1, length))


if __name__ == "__main__":
    main()
