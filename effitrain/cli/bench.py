"""``effitrain bench``."""

import json

import click


@click.group("bench")
def command() -> None:
    """Time the kernels on this machine's card, after checking them."""


@command.command("kernels")
@click.option("--shapes", type=click.Choice(["8B", "70B"]), multiple=True, default=["8B", "70B"], show_default=True)
@click.option("--tokens", type=click.IntRange(1), default=4096, show_default=True, help="Tokens of a micro-batch.")
@click.option("--rank", type=click.IntRange(1), default=16, show_default=True, help="Rank of the updates.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def kernels(shapes: tuple[str, ...], tokens: int, rank: int, as_json: bool) -> None:
    """Each kernel against torch, torch.compile, bitsandbytes and, if installed, liger-kernel."""
    from dataclasses import replace

    import torch

    from effitrain.core.errors import InputError
    from effitrain.evals import bench_kernels as room

    if not torch.cuda.is_available():
        raise InputError("There is no CUDA card here to time kernels on.", next_step="effitrain doctor says what is.")
    timings = []
    for name in shapes:
        sizes = replace({"8B": room.LLAMA_8B, "70B": room.LLAMA_70B}[name], tokens=tokens, rank=rank)
        for timing in room.bench(sizes, torch.device("cuda"), torch.bfloat16):
            timings.append(timing)
            if not as_json:
                click.echo(room.line(timing))
    if as_json:
        about = {"card": torch.cuda.get_device_name(), "torch": torch.__version__, "timings": room.as_json(timings)}
        click.echo(json.dumps(about, indent=2))
