"""``effitrain store``: the quantised models on disk that layers stream from."""

from pathlib import Path

import click

from effitrain.core.errors import InputError
from effitrain.core.units import format_bytes


@click.group("store", short_help="See, check and remove the stores that layers stream from.")
def command() -> None:
    """See, check and remove the quantised models that layers stream from."""


@command.command("ls")
def ls() -> None:
    """List the stores with their sizes."""
    from effitrain.io.disk import folder_bytes
    from effitrain.io.stores import default_store_dir, list_stores, origin_of

    root = default_store_dir()
    folders = list_stores(root)
    for folder in folders:
        origin = origin_of(folder)
        click.echo(f"{format_bytes(folder_bytes(folder)):>10}  {folder.name}" + (f"  from {origin}" if origin else ""))
    click.echo(f"{len(folders)} in {root}")


@command.command("verify")
@click.argument("names", nargs=-1)
def verify(names: tuple[str, ...]) -> None:
    """Read stores, all unless some are named, and compare every byte with what was written."""
    from effitrain.io.store import verify_store
    from effitrain.io.stores import SUFFIX, default_store_dir, list_stores

    root = default_store_dir()
    found = [folder.name for folder in list_stores(root) if not folder.name.endswith(SUFFIX)]
    for name in names or found:
        verify_store(_named(root, name))
        click.echo(f"{name}: as it was written")


@command.command("rm")
@click.argument("names", nargs=-1, required=True)
def rm(names: tuple[str, ...]) -> None:
    """Remove stores, finished or not; the next run that needs one builds it again."""
    from effitrain.io.store import remove_store
    from effitrain.io.stores import default_store_dir

    root = default_store_dir()
    for folder in [_named(root, name) for name in names]:
        remove_store(folder)
        click.echo(f"removed {folder.name}")


def _named(root: Path, name: str) -> Path:
    """The folder of a store, never one elsewhere."""
    from effitrain.io.stores import list_stores

    folders = {folder.name: folder for folder in list_stores(root)}
    if name not in folders:
        listed = ", ".join(folders) or "none"
        raise InputError(
            f"There is no store {name!r} in {root}; there are: {listed}.",
            next_step="`effitrain store ls` shows them all.",
        )
    return folders[name]
