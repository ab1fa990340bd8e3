"""Flags made from the recipe's fields: one name, one meaning, one default everywhere."""

import types
from collections.abc import Callable, Container, Iterable
from typing import Any, Literal, Union, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from effitrain.core.names import flag_of, nearest_name
from effitrain.core.recipe import Recipe, read_recipe_file
from effitrain.core.system import ONE_CARD, SEVERAL_CARDS

MODEL_FIELDS = ("model", "weights")
DATA_FIELDS = ("dataset", "format", "columns", "template", "train_on_prompt", "truncation", "packing", "join_documents")
MEMORY_FIELDS = ("gpu_mem", "host_mem", "quant", "dtype", "batch_size", "max_seq_len", "seed")
WHOLE_MODEL = (*MEMORY_FIELDS, "fit", "resident_layers")  # of verbs that use a model as it is
_BYTE_FIELDS = {"gpu_mem", "host_mem"}


def recipe_flags(fields: Iterable[str] | None = None, without: Container[str] = ()) -> Callable[[Any], Any]:
    """Decorator that gives a command a flag for each recipe field, all of them by default, and ``--config``; values in
    ``without`` are not offered.
    """
    chosen = list(fields or Recipe.model_fields)

    def decorate(command: Any) -> Any:
        for name in reversed(chosen):
            command = _option(name, Recipe.model_fields[name], without)(command)
        return click.option("--config", metavar="FILE", help="Recipe in YAML; flags override it.")(command)

    return decorate


def recipe_fields(values: dict[str, Any]) -> dict[str, Any]:
    """Raw recipe fields from parsed flags: those of ``--config``, overridden by the flags that were given."""
    given = {name: value for name, value in values.items() if name in Recipe.model_fields and value is not None}
    config = values.get("config")
    return {**(read_recipe_file(config) if config else {}), **given}


def usage(error: click.UsageError) -> str:
    """What to say of a command line that cannot be read, and where to look."""
    told = _unknown_flag(error) if isinstance(error, click.NoSuchOption) else error.format_message().rstrip(".") + "."
    return f"{told}\n`{error.ctx.command_path if error.ctx else 'effitrain VERB'} --help` says what it takes."


def _unknown_flag(error: click.NoSuchOption) -> str:
    """A flag that the command does not have: another verb's, or which one was probably meant."""
    name = error.option_name.lstrip("-").removeprefix("no-").replace("-", "_")
    if name in Recipe.model_fields:
        return f"{error.option_name} is for `effitrain run` and `effitrain plan`; this verb has no use for it."
    if name in SEVERAL_CARDS:
        return f"No such flag: {error.option_name}. {ONE_CARD}"
    own = [param.name for param in error.ctx.command.params if param.name] if error.ctx else []
    nearest = nearest_name(name, own)
    return f"No such flag: {error.option_name}." + (f" Did you mean {flag_of(nearest)}?" if nearest else "")


def _option(name: str, field: FieldInfo, without: Container[str]) -> Callable[[Any], Any]:
    flag = flag_of(name)
    names = [flag, "-o", name] if name == "output_dir" else [flag, name]
    if _bare(field.annotation) is bool:
        names[0] = f"{flag}/--no-{name.replace('_', '-')}"
        return click.option(*names, default=None, help=_help(field))
    return click.option(*names, default=None, metavar=_metavar(name, field, without), help=_help(field))


def _help(field: FieldInfo) -> str:
    shown = field.default if not isinstance(field.default, bool) else "on" if field.default else "off"
    end = "" if str(field.description).endswith(".") else "."
    return f"{field.description}{end}" + ("" if shown is None else f"  [{shown}]")


def _metavar(name: str, field: FieldInfo, without: Container[str]) -> str:
    kind = _bare(field.annotation)
    if get_origin(kind) is Literal:
        return "|".join(value for value in get_args(kind) if value not in without)
    if name in _BYTE_FIELDS:
        return "SIZE"
    return {int: "N", float: "X"}.get(kind, "TEXT")


def _bare(kind: Any) -> Any:
    """The type without ``None``."""
    if get_origin(kind) in (Union, types.UnionType):
        return next(arg for arg in get_args(kind) if arg is not type(None))
    return kind
