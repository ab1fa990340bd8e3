"""``effitrain eval``."""

import json
from typing import Any

import click

from effitrain.cli.flags import DATA_FIELDS, MEMORY_FIELDS, MODEL_FIELDS, recipe_fields, recipe_flags


@click.command("eval")
@recipe_flags([*MODEL_FIELDS, *DATA_FIELDS, *MEMORY_FIELDS])
@click.option("--adapter", metavar="DIR", help="Adapter folder, or a run folder that holds one.")
@click.option("--json", "as_json", is_flag=True, help="Print loss, perplexity and tokens as JSON.")
def command(adapter: str | None, as_json: bool, **flags: Any) -> None:
    """Loss and perplexity of a model, with or without an adapter."""
    from effitrain.planning import recipe

    asked = recipe(**recipe_fields(flags))
    from effitrain import api

    scores = api.evaluate(asked, adapter)
    if as_json:
        click.echo(json.dumps(scores, indent=2))
    else:
        click.echo(f"loss {scores['loss']:.4f}, perplexity {scores['perplexity']:.3f}, {scores['tokens']} tokens")
