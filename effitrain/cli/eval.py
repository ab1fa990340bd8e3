"""``effitrain eval``."""

import json
from collections.abc import Mapping
from typing import Any

import click

from effitrain.cli.flags import DATA_FIELDS, MODEL_FIELDS, WHOLE_MODEL, recipe_fields, recipe_flags


def _lengths(_context: click.Context, _option: click.Parameter, value: str | None) -> tuple[int, ...]:
    parts = [part.strip() for part in value.split(",")] if value else []
    if not all(part.isdecimal() and int(part) for part in parts):
        raise click.BadParameter("write lengths in tokens, like 1024,2048")
    return tuple(map(int, parts))


def _bucket(_context: click.Context, _option: click.Parameter, value: str | None) -> int | str | None:
    if value is None or value == "auto":
        return value
    if not (value.isdecimal() and int(value)):
        raise click.BadParameter("write the tokens of a bucket, like 256, or nothing")
    return int(value)


@click.command("eval")
@recipe_flags([*MODEL_FIELDS, *DATA_FIELDS, *WHOLE_MODEL], without=("prune",))
@click.option("--adapter", metavar="DIR", help="Adapter folder, or a run folder that holds one.")
@click.option(
    "--by-position",
    is_flag=False,
    flag_value="auto",
    metavar="[N]",
    callback=_bucket,
    help="The loss by position in the sample too, in buckets of N tokens; an eighth of the longest, at least 256.",
)
@click.option(
    "--passkey",
    metavar="N,N,...",
    callback=_lengths,
    help="Hide a number in prompts of N tokens and ask for it; without --dataset that alone.",
)
@click.option("--json", "as_json", is_flag=True, help="Print loss, perplexity and tokens as JSON.")
def command(
    adapter: str | None, by_position: Any, passkey: tuple[int, ...], as_json: bool, **flags: Any
) -> None:  # fmt: skip
    """Loss and perplexity of a model, with or without an adapter."""
    from effitrain.planning import recipe

    asked = recipe(**recipe_fields(flags))
    from effitrain import api

    scores = api.evaluate(asked, adapter, by_position, passkey)
    if as_json:
        click.echo(json.dumps(scores, indent=2))
        return
    click.echo("\n".join(_lines(scores)))
    if asked.quant == "nf4":
        click.echo("The frozen weights were in NF4; --quant none takes them as they are.")


def _lines(scores: Mapping[str, Any]) -> list[str]:
    """What people read."""
    lines = [f"Warning: {warning}" for warning in scores.get("warnings", ())]
    if "loss" in scores:
        lines.append(f"loss {scores['loss']:.4f}, perplexity {scores['perplexity']:.3f}, {scores['tokens']} tokens")
    for bucket in scores.get("by_position", ()):
        where = f"positions {bucket['start']:>6} to {bucket['end'] - 1:>6}"
        lines.append(f"{where}  loss {bucket['loss']:.4f}, {bucket['tokens']} tokens")
    for found in scores.get("passkey", ()):
        where = f"passkey in {found['length']:>6} tokens at depth {found['depth']:.2f}"
        lines.append(f"{where}  {found['accuracy']:.0%} of {found['trials']}")
    return lines
