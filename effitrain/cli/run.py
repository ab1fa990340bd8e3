"""``effitrain run``: flags to a recipe, the recipe to ``api.run``, what it tells to the terminal."""

import json
from typing import Any

import click

from effitrain.cli.flags import recipe_fields, recipe_flags
from effitrain.core.errors import BudgetError


@click.command("run", short_help="Plan, load, train, evaluate and report.")
@recipe_flags()
@click.option("--prove", is_flag=True, help="Check the plan by running its step on shapes alone, before loading.")
@click.option("--dry-run", is_flag=True, help="Stop after the plan; nothing is loaded.")
@click.option("--json", "as_json", is_flag=True, help="Print only report.json, or with --dry-run plan.json.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def command(prove: bool, dry_run: bool, as_json: bool, quiet: bool, **flags: Any) -> None:
    """Plan, load, train, evaluate and report; with no flags at all, on the built-in model and data."""
    from effitrain.planning import recipe

    asked = recipe(**recipe_fields(flags))  # bad flags are told before torch is imported
    from effitrain import api
    from effitrain.cli.console import Console, KeepsPlan

    plan_keeper, console = KeepsPlan(), Console()
    events = plan_keeper if as_json else api.Events() if quiet else console
    try:
        report = api.run(asked, events, dry_run, prove)
    except BudgetError as error:
        if as_json and dry_run:
            click.echo(_json(error.plan))
        raise
    finally:
        console.close()
    if as_json:
        click.echo(_json(report or plan_keeper.plan))
    elif report and not quiet:
        for warning in report.warnings:
            console.note(f"Note: {warning}")
        out = asked.output_dir
        click.echo(f"Adapter: {out}/{report.adapter}" if report.adapter else f"Model:   {out}/model")
        click.echo(f"Report:  {out}/report.html")


def _json(value: Any) -> str:
    return json.dumps(value.to_json(), indent=2)
