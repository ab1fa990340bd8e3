"""``effitrain doctor``."""

import click


@click.command("doctor", short_help="Check the machine, the packages, and that training is right.")
def command() -> None:
    """Check the machine, the packages, and that training here is right; exit 1 when something is wrong."""
    from effitrain.evals.doctor import checks

    wrong = 0
    for check in checks():
        sign, colour = {True: ("ok", "green"), False: ("wrong", "red"), None: ("--", None)}[check.ok]
        click.echo(f"{click.style(f'{sign:5}', fg=colour)}  {check.name}: {check.detail}")
        wrong += check.ok is False
    if wrong:
        raise click.exceptions.Exit(1)
