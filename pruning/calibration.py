"""Calibration text: what scores and alignment look at, from any data set that training takes."""

from dataclasses import dataclass

from effitrain.core.errors import InputError
from effitrain.core.recipe import Recipe
from effitrain.core.stages import BATCH_TOKENS, calibration_tokens
from effitrain.data.batches import Batches, MicroBatch
from effitrain.data.prepare import PreparedData, prepare_data
from effitrain.model.load import Base

LEAST_TOKENS = 256


@dataclass(frozen=True)
class Calibration:
    """Micro-batches of text, and a fingerprint of what they were made from."""

    batches: tuple[MicroBatch, ...]
    fingerprint: str

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return sum(len(batch.input_ids) for batch in self.batches)


def calibrate(recipe: Recipe, base: Base, data: PreparedData | None = None) -> Calibration:
    """The first samples, in the order of the recipe's seed, of its calibration data or else of its training data.

    Args:
        recipe: with its sequence length chosen.
        base: its tokenizer is used.
        data: the recipe's own data set, if it is prepared already.

    Raises:
        InputError: the data set cannot be used, or is too small.
    """
    length = recipe.max_seq_len
    assert length is not None
    if recipe.calib_dataset:
        recipe = recipe.changed(dataset=recipe.calib_dataset, eval_dataset=None, eval_fraction=0.0)
        data = None
    data = data or prepare_data(recipe, base.tokenizer(), length)
    batches = Batches(data.train, max(1, BATCH_TOKENS // length), length, False, recipe.seed)
    wanted, chosen = calibration_tokens(base.spec.ffn), list[MicroBatch]()
    while len(chosen) < batches.per_epoch and sum(len(batch.input_ids) for batch in chosen) < wanted:
        chosen.append(batches.get(len(chosen)))
    found = Calibration(tuple(chosen), f"{data.fingerprint}/{recipe.seed}")
    if found.tokens < LEAST_TOKENS:
        raise InputError(
            f"The calibration text has {found.tokens} tokens; scores and alignment need {LEAST_TOKENS} at least.",
            next_step="Name more text with --calib-dataset, or use --prune-score random --align none.",
        )
    return found
