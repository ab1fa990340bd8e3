"""``effitrain VERB``: finds the verb's file, and turns errors into one message and an exit code."""

import importlib
import os
import sys

import click

from effitrain.cli.flags import usage
from effitrain.cli.wrap import wrapped
from effitrain.core.errors import EffitrainError, InputError
from effitrain.core.names import nearest_name
from effitrain.core.system import check_system

VERBS = ("plan", "run", "prune", "recover", "eval", "chat", "export", "store", "doctor", "bench")
# What other tools call these.
_ELSEWHERE = {"train": "run", "finetune": "run", "sft": "run", "merge": "export", "generate": "chat", "infer": "chat"}


class _Verbs(click.Group):
    """Loads only the verb that was asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command:
        if name not in VERBS:
            nearest = _ELSEWHERE.get(name) or nearest_name(name, VERBS)
            hint = f" Did you mean {nearest}?" if nearest else ""
            raise InputError(f"There is no verb {name!r}.{hint}", next_step="`effitrain --help` lists them.")
        module = importlib.import_module(f"effitrain.cli.{name}")
        command: click.Command = module.command
        return command


@click.group(
    cls=_Verbs,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 110,
        "token_normalize_func": lambda token: token.replace("_", "-"),
    },
)
@click.version_option(package_name="effitrain", message="%(version)s")
def cli() -> None:
    """Adapt a language model far larger than your GPU, exactly within a memory budget you name."""


def main(args: list[str] | None = None) -> None:
    """Entry point of the console script; exits with 0, 2 (bad input), 3 (nothing fits), 130 (interrupted) or 1."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # said aloud, so that no fork brings a warning
    try:
        check_system()
        code = cli.main(args, prog_name="effitrain", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(2)
    except click.UsageError as error:
        _fail(usage(error), 2)
    except click.ClickException as error:
        _fail(error.format_message(), 2)
    except EffitrainError as error:
        _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _fail("Interrupted.", 130)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    told = f"effitrain: {message}"
    if sys.stderr.isatty():  # a log keeps each message's lines whole, for those who search it
        from rich.console import Console as Terminal

        told = wrapped(told, Terminal(stderr=True).width)
    click.echo(told, err=True)
    sys.exit(code)
