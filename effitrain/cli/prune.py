"""``effitrain prune``."""

from typing import Any

import click

from effitrain.cli.flags import DATA_FIELDS, recipe_fields, recipe_flags
from effitrain.core.recipe import Recipe

_CHOICES = [field for field in Recipe.fields_in("pruning") if field not in ("small_model", "prune_method")]
_DATA = [*DATA_FIELDS, "eval_dataset", "eval_fraction", "seed", "quant", "dtype"]
_LENGTH = ["max_seq_len", "rope_scaling", "rope_factor"]


@click.command("prune", short_help="Write a structurally pruned model folder to train on.")
@recipe_flags(["model", *_CHOICES, *_DATA, *_LENGTH, "output_dir"])
def command(**flags: Any) -> None:
    """Write a structurally pruned model folder to train on, aligned to the full-size model."""
    from effitrain.planning import recipe

    asked = recipe(**{**recipe_fields(flags), "fit": "prune"})
    from effitrain import api

    click.echo(f"Written: {api.prune(asked, click.echo)}")
