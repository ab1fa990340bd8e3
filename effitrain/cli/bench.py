"""``effitrain bench``."""

import json

import click


@click.group("bench")
def command() -> None:
    """Time kernels and steps on this machine, after checking them."""


@command.command("kernels")
@click.option("--shapes", type=click.Choice(["8B", "70B"]), multiple=True, default=["8B", "70B"], show_default=True)
@click.option("--tokens", type=click.IntRange(1), multiple=True, default=[4096], show_default=True, help="Of a step.")
@click.option("--rank", type=click.IntRange(1), multiple=True, default=[16], show_default=True, help="Of the updates.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def kernels(shapes: tuple[str, ...], tokens: tuple[int, ...], rank: tuple[int, ...], as_json: bool) -> None:
    """Each kernel against torch, torch.compile, bitsandbytes, and peft, liger-kernel and Unsloth where installed.

    Give --shapes, --tokens and --rank several times to time all combinations.
    """
    from dataclasses import replace
    from itertools import product

    import torch

    from effitrain.core.errors import InputError
    from effitrain.evals import bench_kernels as room
    from effitrain.evals.bench_cases import LLAMA_8B, LLAMA_70B

    if not torch.cuda.is_available():
        raise InputError(
            "There is no CUDA card here to time kernels on.",
            next_step="`effitrain doctor` says what was found instead.",
        )
    timings = []
    for name, count, r in product(shapes, tokens, rank):
        sizes = replace({"8B": LLAMA_8B, "70B": LLAMA_70B}[name], tokens=count, rank=r)
        for timing in room.bench(sizes, torch.device("cuda"), torch.bfloat16):
            timings.append(timing)
            if not as_json:
                click.echo(room.line(timing))
    if as_json:
        about = {"card": torch.cuda.get_device_name(), **room.versions(), "timings": room.as_json(timings)}
        click.echo(json.dumps(about, indent=2))


@command.command("step")
@click.option("--model", help="Preset or folder whose shape is taken.  [llama-3.1-8b; tiny on a CPU]")
@click.option("--rows", type=click.IntRange(1), default=4, show_default=True, help="Samples of a step.")
@click.option("--length", type=click.IntRange(8), help="Tokens of a sample.  [2048; 512 on a CPU]")
@click.option("--rank", type=click.IntRange(1), default=16, show_default=True, help="Rank of LoRA, on all linears.")
@click.option("--steps", type=click.IntRange(1), default=8, show_default=True, help="Steps that count, after two.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def step(model: str | None, rows: int, length: int | None, rank: int, steps: int, as_json: bool) -> None:
    """A step over synthetic NF4 weights: ours, without kernels, transformers + peft + bitsandbytes, and Unsloth."""
    import torch

    from effitrain.core.units import format_bytes
    from effitrain.evals.bench_kernels import versions
    from effitrain.evals.bench_step import check_memory, in_processes

    def tell(text: str) -> None:
        if not as_json:
            click.echo(text, err=True)

    on_card = torch.cuda.is_available()
    if not on_card and model is None:
        tell("There is no CUDA card here: this times a step of the built-in tiny model. --model names another.")
    model, length = model or ("llama-3.1-8b" if on_card else "tiny"), length or (2048 if on_card else 512)
    sizes, where = (rows, length, rank, steps), "cuda bf16" if on_card else "cpu fp32"
    if not on_card:
        check_memory(model, sizes)
    results = []
    for result in in_processes(model, sizes, where, tell):
        results.append(result)
        if as_json:
            continue
        if "failed" in result:
            click.echo(f"{result['contender']}: failed. {result['failed']}")
            continue
        speed, peak = result["tokens_per_second"], format_bytes(result["peak_bytes"])
        loss = f"first loss {result['losses'][0]:.4f}{'' if result['same_loss'] else ', NOT THE SAME'}"
        click.echo(f"{result['contender']:36} {speed:10,.0f} tokens/s, peak {peak}, {loss}")
    if as_json:
        card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        click.echo(json.dumps({"card": card, **versions(), "contenders": results}, indent=2))
