"""``effitrain export``."""

from typing import Any

import click
from tqdm import tqdm

from effitrain.cli.flags import recipe_fields, recipe_flags


@click.command("export", short_help="Write an adapter for peft, vLLM and llama.cpp, or merge it.")
@recipe_flags(["model", "output_dir"])
@click.option("--adapter", metavar="DIR", required=True, help="Adapter folder, or a run folder that holds one.")
@click.option(
    "--to",
    type=click.Choice(["peft", "merged"]),
    default="peft",
    show_default=True,
    help="What to write: the adapter in the form that peft, vLLM and llama.cpp read alike, or the model with it merged"
    " in, in bf16 whatever it was stored in.",
)
def command(adapter: str, to: str, **flags: Any) -> None:
    """Write an adapter for peft, vLLM and llama.cpp, or merged into the unquantised model."""
    from effitrain.planning import recipe

    asked = recipe(**recipe_fields(flags))
    from effitrain import api

    with tqdm(desc="merging", unit="tensor", disable=to != "merged" or None) as bar:  # None: no bar in a log
        written = api.export(asked, adapter, asked.output_dir, to, lambda name: bar.update() and None, click.echo)
    click.echo(f"Written: {written}" + (", the whole model in bf16" if to == "merged" else ""))
