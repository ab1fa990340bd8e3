"""``effitrain plan``."""

import json
from typing import Any

import click

from effitrain.cli.flags import recipe_fields, recipe_flags


@click.command("plan", short_help="Say what fits and where every byte goes; no weights, no GPU.")
@recipe_flags()
@click.option("--prove", is_flag=True, help="Check it by running the real step on shapes alone.")
@click.option("--json", "as_json", is_flag=True, help="Print plan.json.")
def command(prove: bool, as_json: bool, **flags: Any) -> None:
    """Say what fits and where every byte goes, without weights and without a GPU.

    It takes the flags of `run`, so that one may be typed in place of the other; those that cost no memory change
    nothing.
    """
    from effitrain import planning
    from effitrain.cli.plan_table import print_plan

    recipe = planning.recipe(**recipe_fields(flags))
    if prove:
        from effitrain import api

        plan = api.prove(recipe)
    else:
        plan = planning.plan(recipe)
    if as_json:
        click.echo(json.dumps(plan.to_json(), indent=2))
    else:
        print_plan(plan, others=True)
    if not plan.fits:
        raise click.exceptions.Exit(3)
