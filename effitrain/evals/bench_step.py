"""A whole training step: ours with and without kernels, transformers with peft and bitsandbytes, Unsloth where it is.

All train LoRA on every linear of the decoder over the same synthetic NF4 weights and the same tokens, with layers
recomputed. A contender is measured in a process of its own, so that its peak is its own.
"""

import ctypes
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effitrain.adapters.attach import attach
from effitrain.adapters.base import AdapterConfig, Clock
from effitrain.core.errors import BudgetError
from effitrain.core.plan import make_plan
from effitrain.core.recipe import make_recipe
from effitrain.data.batches import MicroBatch
from effitrain.evals import peers
from effitrain.evals.peers import UNSLOTH, stock_linear, write_checkpoint
from effitrain.io.machine import find_budget
from effitrain.io.synthetic import SyntheticCheckpoint, shapes_of
from effitrain.model.decoder import build
from effitrain.model.load import DTYPES, Base, fill, find_base
from effitrain.train.loop import accumulate
from effitrain.train.memory import StorageTracker

CONTENDERS = ("effitrain", "effitrain without kernels", "transformers + peft + bitsandbytes", UNSLOTH)
WARM_UP = 2
SAME = 0.01  # of the first loss, from equal weights: rounding to bf16 in another order changes some 1e-3 of it
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
Step = tuple[Callable[[], float], list[nn.Parameter]]


@dataclass(frozen=True)
class Work:
    """What every contender does: steps over ``rows`` samples of ``length`` tokens."""

    base: Base
    rows: int
    length: int
    rank: int
    steps: int
    device: torch.device
    dtype: torch.dtype

    @property
    def weights(self) -> SyntheticCheckpoint:
        """The same for everybody."""
        return SyntheticCheckpoint(shapes_of(self.base.spec), 0, True, self.dtype)

    @property
    def tokens(self) -> Tensor:
        """[rows, length], on the host."""
        source = torch.Generator().manual_seed(0)
        return torch.randint(self.base.spec.vocab, (self.rows, self.length), generator=source)


def measure(contender: str, work: Work) -> dict[str, Any]:
    """Tokens a second, bytes of tensors at the peak and the loss of each step."""
    torch.manual_seed(0)
    on_card, tracker = work.device.type == "cuda", StorageTracker()
    with nullcontext() if on_card else tracker:  # which slows a step down, so that only those that warm up are tracked
        step, parameters = {CONTENDERS[2]: _stock, UNSLOTH: _unsloth}.get(contender, _ours)(work)
        optimizer = torch.optim.AdamW(parameters, lr=1e-4)
        tracker.restart()  # what loading took besides is gone
        losses = [_timed(step, optimizer, on_card)[0] for _ in range(WARM_UP)]
    if on_card:
        torch.cuda.reset_peak_memory_stats()
    counted = [_timed(step, optimizer, on_card) for _ in range(work.steps)]
    return {
        "contender": contender,
        "tokens_per_second": work.tokens.numel() / statistics.median(seconds for _, seconds in counted),
        "peak_bytes": torch.cuda.max_memory_allocated() if on_card else tracker.peak,
        "losses": losses + [loss for loss, _ in counted],
    }


def _timed(step: Callable[[], float], optimizer: torch.optim.Optimizer, on_card: bool) -> tuple[float, float]:
    """The loss of a step, and its seconds."""
    started = time.perf_counter()
    loss = step()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if on_card:
        torch.cuda.synchronize()
    return loss, time.perf_counter() - started


def check_memory(model: str, sizes: Sequence[int]) -> None:
    """Refuse a step that takes more memory than this machine has, before anything is loaded.

    Args:
        model: whose shape is taken.
        sizes: rows, length, rank and steps.

    Raises:
        BudgetError: even ours does.
    """
    rows, length, rank, _ = sizes
    fixed = {"recompute": "layer", "offload_activations": "off", "mlp_tiles": 1, "optimizer": "adamw"}
    shape = {"batch_size": rows, "grad_accum": 1, "max_seq_len": length, "lora_r": rank}
    recipe = make_recipe({"model": model, "fit": "resident", **fixed, **shape})
    plan = make_plan(find_base(model, "synthetic").spec, recipe, find_budget(recipe))
    if not plan.fits:
        raise BudgetError(
            f"A step of {rows} x {length} tokens with {model} takes more than 80 % of what is free here.",
            plan.reasons[0],
            "Name a smaller --model, or fewer --rows or a shorter --length.",
            plan=plan,
        )


def in_processes(
    model: str, sizes: Sequence[int], where: str, tell: Callable[[str], None] = lambda text: None
) -> Iterator[dict[str, Any]]:
    """What ``measure`` says of each contender, each in a process of its own; one that fails says why.

    ``same_loss`` of the others: whether their first loss is the first contender's.

    Args:
        model: whose shape is taken.
        sizes: rows, length, rank and steps.
        where: device and dtype, such as ``cuda bf16``.
        tell: told which one is being timed.
    """
    first = None
    contenders = [name for name in CONTENDERS if name != UNSLOTH or peers.installed("unsloth")]
    for number, contender in enumerate(contenders, 1):
        tell(f"Timing {contender}, {number} of {len(contenders)}")
        off = {"EFFITRAIN_KERNELS_OFF": "all"} if contender == CONTENDERS[1] else {}
        arguments = [contender, model, *map(str, sizes), *where.split(), str(os.getpid())]
        done = subprocess.run(
            [sys.executable, "-P", "-m", __name__, *arguments],
            env={**os.environ, **off},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            yield {"contender": contender, "failed": done.stderr[-1000:]}
            continue
        result = json.loads(done.stdout.splitlines()[-1])
        first = result["losses"][0] if first is None else first
        yield {**result, "same_loss": math.isclose(result["losses"][0], first, rel_tol=SAME)}


def main(contender: str, model: str, *arguments: str) -> None:
    """One contender in this process; the result is the last line."""
    *sizes, device, dtype, parent = arguments
    end_with(int(parent))
    if contender == UNSLOTH:  # before what it changes
        peers.import_unsloth()
    rows, length, rank, steps = map(int, sizes)
    base = find_base(model, "synthetic")
    print(json.dumps(measure(contender, Work(base, rows, length, rank, steps, torch.device(device), DTYPES[dtype]))))


def end_with(parent: int) -> None:
    """Have the system kill this process when ``parent``, which started it, ends in whatever way."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        sys.exit(1)


def _ours(work: Work) -> Step:
    spec = work.base.spec
    decoder = build(spec, work.base.source.config, spec.name)
    fill(decoder, work.weights, "nf4", work.dtype, work.device, host_embedding=True)
    decoder.set_recompute("layer")
    attach(decoder, AdapterConfig(r=work.rank, alpha=2 * work.rank), Clock(0))
    parameters = [p for p in decoder.parameters() if p.requires_grad]
    labels = work.tokens.roll(-1, 1)
    labels[:, -1] = -100
    positions = torch.arange(work.length).repeat(work.rows)
    labels = labels.flatten()
    rows, segments = (labels != -100).nonzero().flatten(), (work.length,) * work.rows
    batch = MicroBatch(work.tokens.flatten(), labels, positions, segments, rows, work.rows)
    return lambda: accumulate(decoder, [batch], Clock(0), parameters), parameters


def _stock(work: Work) -> Step:
    import peft
    import transformers

    config = transformers.AutoConfig.for_model(**work.base.source.config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=work.dtype)
    for name in work.weights.names():
        _set(model, name, work)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(work.device)
    model.tie_weights()
    lora = peft.LoraConfig(r=work.rank, lora_alpha=2 * work.rank, target_modules=_targets(model))
    adapted: Any = peft.get_peft_model(model, lora)
    adapted.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return _transformers_step(adapted, work)


def _unsloth(work: Work) -> Step:
    """By the two calls of its manual, from a checkpoint in NF4."""
    fast = peers.import_unsloth().FastLanguageModel
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), work.weights, work.base.source.config, work.dtype)
        model, _ = fast.from_pretrained(folder, max_seq_length=work.length, dtype=work.dtype, load_in_4bit=True)
    adapted = fast.get_peft_model(
        model,
        r=work.rank,
        lora_alpha=2 * work.rank,
        target_modules=_targets(model),
        use_gradient_checkpointing="unsloth",
    )
    return _transformers_step(adapted, work)


def _targets(model: nn.Module) -> list[str]:
    """Names of the decoder's linears."""
    return sorted({name.split(".")[-1] for name, _ in model.named_modules() if name.endswith("_proj")})


def _transformers_step(model: Any, work: Work) -> Step:
    """A step of transformers' causal language model."""
    tokens, forward = work.tokens.to(work.device), peers.autocast(model, work.device, work.dtype)

    def step() -> float:
        loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return loss.item()

    return step, [p for p in model.parameters() if p.requires_grad]


def _set(model: nn.Module, name: str, work: Work) -> None:
    """Put one synthetic tensor in its place; a quantised one in bitsandbytes' linear."""
    path, _, leaf = name.rpartition(".")
    module: Any = model.get_submodule(path)
    if not work.weights.is_nf4(name):
        setattr(module, leaf, nn.Parameter(work.weights.read(name, work.device), requires_grad=False))
        return
    model.set_submodule(path, stock_linear(work.weights.read_nf4(name, work.device), work.dtype, module.bias))


if __name__ == "__main__":
    main(*sys.argv[1:])
