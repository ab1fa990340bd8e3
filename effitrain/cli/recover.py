"""``effitrain recover``."""

from typing import Any

import click

from effitrain.cli.flags import recipe_fields, recipe_flags


@click.command("recover", short_help="Turn a small model's adapter into the full-size model's.")
@recipe_flags(["model", "output_dir"])
@click.option("--adapter", metavar="DIR", required=True, help="Adapter of the small model, or a run folder with one.")
@click.option("--keep", metavar="FILE", required=True, help="keep.safetensors, or the small model's folder.")
def command(adapter: str, keep: str, **flags: Any) -> None:
    """Turn an adapter of a small model into one of the full-size model it was pruned from."""
    from effitrain.planning import recipe

    asked = recipe(**recipe_fields(flags))
    from effitrain import api

    click.echo(f"Written: {api.recover(adapter, keep, asked.model, asked.output_dir)}")
