"""LongLoRA in small: stories3M, made for 512 positions, learns to use 2,048 on novels.

The text is War and Peace and Moby-Dick, joined and cut into rows of 2,048 tokens; the last tenth of each book is held
out. Two arms train a LoRA with norms and embedding rows on positions divided by four, the same rows in the same order:
one with shifted sparse attention in groups of 512, one with full attention. Both are scored with full attention, by
position. The untouched model is scored beside them, with its own positions and with divided ones.

    EFFITRAIN_DATA=DIR python scripts/study_longlora.py -o docs              about a quarter of an hour
    EFFITRAIN_DATA=DIR python scripts/study_longlora.py -o OUT --steps 12    two CPU minutes
    EFFITRAIN_DATA=DIR python scripts/study_longlora.py -o OUT --quick       half a minute: three steps on 768 tokens
"""

import argparse
import os
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from study.record import Figures, Record, Run, put_between_marks

from effitrain.adapters.base import Clock
from effitrain.core.choices import group_of
from effitrain.core.recipe import Recipe
from effitrain.data.batches import Batches
from effitrain.data.tokenized import TokenSet
from effitrain.evals.positions import loss_by_position
from effitrain.model.decoder import Decoder
from effitrain.model.load import find_base, load_model
from effitrain.planning import at_positions, recipe
from effitrain.train.loop import Course, train
from effitrain.train.optim import make_optimizer
from effitrain.train.state import TrainState
from effitrain.train.trainable import make_trainable

BOOKS = ("war_and_peace_2600", "moby_dick_2701")
KNOWN, ROWS, BUCKETS, HELD_OUT, LR = 512, 4, 8, 0.1, 3e-3
IN_FULL = {"train_norms": True, "train_embeddings": True}
ARMS: dict[str, dict[str, Any]] = {
    "untouched": {"rope_scaling": "none"},
    "positions divided, untrained": {},
    "trained, full attention": IN_FULL,
    "trained, s2": {**IN_FULL, "attention": "s2"},
}


def main() -> None:
    """Measure what is not known yet, then write table and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--workers", type=int, default=1)
    asked = parser.parse_args()
    steps, length, rows = (3, 768, 4) if asked.quick else (asked.steps, 2048, 32)
    facts = {"model": "stories3M", "length": length, "steps": steps, "rows": ROWS, "lr": LR, "held_out_rows": rows}
    measured = partial(measure, Path(os.environ["EFFITRAIN_DATA"]), steps, length, rows)
    record = Record(asked.output / "study_longlora.json", facts, asked.workers, measured)
    runs = record.complete([{"arm": arm} for arm in ARMS])
    print(table(runs))
    if (asked.output / "longlora.md").exists():
        put_between_marks(asked.output / "longlora.md", "study_longlora", table(runs))
    plot(runs, asked.output / "study_longlora.png")


def measure(data: Path, steps: int, length: int, rows: int, run: Run) -> Figures:
    """Losses on the held-out rows, by position."""
    torch.set_num_threads(1)
    model = data / "models/stories3M"
    held, taught = books(data, model, length, rows)
    asked = recipe(
        model=str(model), quant="none", dtype="fp32", max_seq_len=length, lora_r=8, lora_alpha=16, lr=LR,
        **{"rope_scaling": "linear", **ARMS[run["arm"]]},
    )  # fmt: skip
    decoder = arm(asked, length, taught, steps)
    buckets = loss_by_position(decoder, Batches(held, 1, length, False, 0), length // BUCKETS)
    return {"ends": [bucket.end for bucket in buckets], "losses": [round(bucket.loss, 4) for bucket in buckets]}


@cache
def books(data: Path, model: Path, length: int, rows: int) -> tuple[TokenSet, TokenSet]:
    """The held-out ends of the books, ``rows`` rows evenly spaced, and their beginnings; every token is trained."""
    tokenizer = find_base(str(model)).tokenizer()
    held: list[Any] = []
    taught: list[Any] = []
    for book in BOOKS:
        text = (data / f"corpora/books/{book}.txt").read_text(encoding="utf-8")
        ids = np.array(tokenizer(text, verbose=False)["input_ids"], np.int32)
        edge = int(len(ids) * (1 - HELD_OUT))
        for part, kept in ((ids[edge:], held), (ids[:edge], taught)):
            kept += np.split(part[: len(part) // length * length], len(part) // length)
    return _set(held[:: max(1, len(held) // rows)][:rows]), _set(taught)


def arm(asked: Recipe, length: int, taught: TokenSet, steps: int) -> Decoder:
    """The model as ``asked`` says; trained where it asks for that."""
    base = find_base(asked.model).fetched()
    asked, config = at_positions(asked, base.source.config)
    decoder = load_model(base.at_positions(config), asked, torch.device("cpu"))
    if not asked.train_norms:
        return decoder
    clock, lr = Clock(asked.seed), asked.lr or LR
    make_trainable(decoder, asked.changed(s2_group=group_of(asked, length)), clock, base.weights)
    trained = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
    batches, course = Batches(taught, ROWS, length, False, asked.seed), Course(steps, steps, 1, lr, warmup=0.1)
    train(decoder, batches, make_optimizer("adamw", trained, lr, 0.0), course, TrainState(), clock)
    return decoder


def table(runs: Sequence[Run]) -> str:
    """Losses by position, and what they should be: at the end as low as where the model was at home, and as low as
    after training with full attention.
    """
    runs = sorted(runs, key=lambda run: list(ARMS).index(run["arm"]))  # written down as they ended
    ends = runs[0]["ends"]
    heads = [f"{start:,}-{end:,}" for start, end in zip([0, *ends], ends, strict=False)]
    lines = [f"| loss at positions | {' | '.join(heads)} |", "| --- " + "| ---: " * len(ends) + "|"]
    lines += [f"| {run['arm']} | {' | '.join(f'{loss:.3f}' for loss in run['losses'])} |" for run in runs]
    full, sparse = runs[2]["losses"], runs[3]["losses"]
    known = next(number for number, end in enumerate(ends) if end >= KNOWN)
    last = len(ends) - len(ends) // 4
    end, home, other = (sum(part) / len(part) for part in (sparse[last:], sparse[known : known + 1], full[last:]))
    return "\n".join(lines) + (
        f"\n\nIn its last quarter the s2 arm's loss is {end / home - 1:+.1%} off its own at {heads[known]}, and"
        f" {end / other - 1:+.1%} off that of full attention."
    )


def plot(runs: Sequence[Run], path: Path) -> None:
    """Loss against position."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for run in runs:
        axes.plot(run["ends"], run["losses"], "o-", label=run["arm"])
    axes.axvline(KNOWN, linestyle=":", color="grey")
    axes.set(xlabel="positions up to", ylabel="loss on held-out text", title="stories3M, made for 512 positions")
    axes.margins(y=0.25)
    axes.legend(loc="upper left", ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def _set(rows: Sequence[Any]) -> TokenSet:
    ids, length = np.concatenate(rows), len(rows[0])
    return TokenSet(ids, ids.copy(), np.arange(0, len(ids) + 1, length))


if __name__ == "__main__":
    main()
