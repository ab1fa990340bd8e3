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


@command.command("step")
@click.option("--model", default="llama-3.1-8b", show_default=True, help="Preset or folder whose shape is taken.")
@click.option("--rows", type=click.IntRange(1), default=4, show_default=True, help="Samples of a step.")
@click.option("--length", type=click.IntRange(2), default=2048, show_default=True, help="Tokens of a sample.")
@click.option("--rank", type=click.IntRange(1), default=16, show_default=True, help="Rank of LoRA, on all linears.")
@click.option("--steps", type=click.IntRange(1), default=8, show_default=True, help="Steps that count, after two.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def step(model: str, rows: int, length: int, rank: int, steps: int, as_json: bool) -> None:
    """A step over synthetic NF4 weights: ours, ours without kernels, and transformers + peft + bitsandbytes."""
    import torch

    from effitrain.core.units import format_bytes
    from effitrain.evals.bench_step import in_processes

    where = "cuda bf16" if torch.cuda.is_available() else "cpu fp32"
    results = []
    for result in in_processes(model, (rows, length, rank, steps), where):
        results.append(result)
        if as_json:
            continue
        if "failed" in result:
            click.echo(f"{result['contender']}: failed. {result['failed']}")
            continue
        speed, peak = result["tokens_per_second"], format_bytes(result["peak_bytes"])
        click.echo(
            f"{result['contender']:36} {speed:10.0f} tokens/s, peak {peak}, first loss {result['losses'][0]:.4f}"
        )
    if as_json:
        click.echo(json.dumps(results, indent=2))
