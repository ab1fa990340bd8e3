"""``effitrain chat``."""

import sys
from typing import TYPE_CHECKING, Any

import click

from effitrain.cli.flags import MODEL_FIELDS, WHOLE_MODEL, recipe_fields, recipe_flags

if TYPE_CHECKING:
    from effitrain.evals.chat import ChatSession


@click.command("chat")
@recipe_flags([*MODEL_FIELDS, "template", *WHOLE_MODEL], without=("prune",))
@click.option("--adapter", metavar="DIR", help="Adapter folder, or a run folder that holds one.")
@click.option("--prompt", multiple=True, help="Answer this and end; several are answered together. Without it, talk.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=200, show_default=True, help="Longest answer.")
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 is greedy.")
def command(
    adapter: str | None, prompt: tuple[str, ...], max_new_tokens: int, temperature: float, **flags: Any
) -> None:
    """Generate text from a model, with or without an adapter."""
    from effitrain.planning import recipe

    asked = recipe(**recipe_fields(flags))
    from effitrain import api

    session = api.chat(asked, adapter)
    asked_of = [[{"role": "user", "content": text}] for text in prompt]
    if len(asked_of) == 1:
        _answer(session, asked_of[0], max_new_tokens, temperature)
    elif asked_of:
        for text in session.answers(asked_of, max_new_tokens, temperature):
            click.echo(text)
    if asked_of:
        return
    click.echo("An empty line ends the chat.", err=True)
    messages: list[dict[str, str]] = []
    while line := _ask():
        messages.append({"role": "user", "content": line})
        text = _answer(session, messages, max_new_tokens, temperature)
        messages.append({"role": "assistant", "content": text})


def _ask() -> str:
    click.echo("> ", nl=False, err=True)
    return sys.stdin.readline().strip()


def _answer(session: "ChatSession", messages: list[dict[str, str]], max_new_tokens: int, temperature: float) -> str:
    pieces = []
    for piece in session.answer(messages, max_new_tokens, temperature):
        click.echo(piece, nl=False)
        pieces.append(piece)
    click.echo()
    return "".join(pieces)
