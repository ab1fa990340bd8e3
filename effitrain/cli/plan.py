"""``effitrain plan``."""

import json
from typing import Any

import click

from effitrain.cli.flags import recipe_fields, recipe_flags


@click.command("plan")
@recipe_flags()
@click.option("--json", "as_json", is_flag=True, help="Print plan.json.")
def command(as_json: bool, **flags: Any) -> None:
    """Say what fits and where every byte goes, without weights and without a GPU."""
    from effitrain import planning
    from effitrain.cli.plan_table import print_plan

    plan = planning.plan(planning.recipe(**recipe_fields(flags)))
    if as_json:
        click.echo(json.dumps(plan.to_json(), indent=2))
    else:
        print_plan(plan)
    if not plan.fits:
        raise click.exceptions.Exit(3)
