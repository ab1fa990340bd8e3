"""Shifted sparse attention against full attention in a training step: time in attention, time and memory of the step.

    OMP_NUM_THREADS=1 python scripts/bench_s2.py --out benchmarks/s2.json      two minutes on one core

A random Llama in float32 takes a LoRA step, every layer computed again, on one row of 8,192 tokens (groups of 2,048)
and on ragged samples of as many. Time in attention is CPU seconds of its forward and backward passes, cutting and
joining included; both sides take turns in one process and medians are reported, so that other programs' load meets
both. The score pairs of the segments are 0.23 of full attention's on one row.
"""

import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from study import measured
from torch import Tensor

from effitrain.adapters.attach import attach
from effitrain.adapters.base import AdapterConfig, Clock
from effitrain.core.spec import spec_from_config
from effitrain.data.batches import MicroBatch
from effitrain.io.synthetic import SyntheticCheckpoint, shapes_of
from effitrain.kernels.shifted_attention import segments_of
from effitrain.model import blocks
from effitrain.model.attention import attention
from effitrain.model.decoder import Decoder, build
from effitrain.model.load import fill
from effitrain.train.loop import accumulate
from effitrain.train.memory import StorageTracker, model_tensors

CONFIG = {
    "model_type": "llama", "vocab_size": 500, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 8192, "tie_word_embeddings": False,
}  # fmt: skip
RAGGED = (0.4, 0.26, 0.2, 0.13, 0.01)  # shares of the tokens; the last two are shorter than a group
SPENT = {"attention": 0.0}


class _Timed(torch.autograd.Function):
    """Attention whose passes are timed on their own."""

    @staticmethod
    def forward(ctx: Any, module: Any, kwargs: dict[str, Any], *inputs: Tensor) -> Tensor:
        started = time.process_time()
        ctx.inputs = [tensor.detach().requires_grad_() for tensor in inputs]
        with torch.enable_grad():
            ctx.out = attention(module, *ctx.inputs, None, **kwargs)[0]  # type: ignore[arg-type]
        SPENT["attention"] += time.process_time() - started
        return ctx.out.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        started = time.process_time()
        grads = torch.autograd.grad(ctx.out, ctx.inputs, grad)
        SPENT["attention"] += time.process_time() - started
        return None, None, *grads


def timed(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, **kwargs: Any) -> tuple[Tensor, None]:
    """In the place of ``attention``."""
    return _Timed.apply(module, kwargs, query, key, value), None


def model() -> Decoder:
    """The Llama with a LoRA on it."""
    spec = spec_from_config(CONFIG, "bench")
    weights = SyntheticCheckpoint(shapes_of(spec), 0, False, torch.float32)
    decoder = fill(build(spec, CONFIG, "bench"), weights, "none", torch.float32, torch.device("cpu"))
    attach(decoder, AdapterConfig(), Clock())
    decoder.set_recompute("layer")
    return decoder


def batch_of(lengths: Sequence[int]) -> MicroBatch:
    """Random samples of these lengths."""
    total = sum(lengths)
    ids, places = torch.randint(CONFIG["vocab_size"], (total,)), torch.arange(total)  # type: ignore[call-overload]
    positions = torch.cat([torch.arange(length) for length in lengths])
    return MicroBatch(ids, ids, positions, tuple(lengths), places, len(lengths))


def step(decoder: Decoder, batch: MicroBatch) -> tuple[float, float]:
    """CPU seconds of a step, and of its attention."""
    SPENT["attention"] = 0.0
    started = time.process_time()
    accumulate(decoder, [batch], Clock(), [p for p in decoder.parameters() if p.requires_grad])
    return time.process_time() - started, SPENT["attention"]


def peak(decoder: Decoder, batch: MicroBatch) -> int:
    """Bytes at the peak of a step, model included."""
    tracker = StorageTracker()
    tracker.add(model_tensors(decoder))
    with tracker:
        step(decoder, batch)
    return tracker.peak


def compare(decoder: Decoder, lengths: Sequence[int], group: int, repeats: int) -> dict[str, Any]:
    """Both kinds of attention on one micro-batch, in turns."""
    batch, seconds = batch_of(lengths), {"full": [], "s2": []}  # type: ignore[var-annotated]
    peaks: dict[str, int] = {}
    for repeat in range(repeats + 1):
        for kind in seconds:
            decoder.set_shifted_group(group if kind == "s2" else None)
            if repeat:  # the first turn warms up, and counts memory
                seconds[kind].append(step(decoder, batch))
            else:
                peaks[kind] = peak(decoder, batch)
    sides = {
        kind: {
            "step_seconds": statistics.median(whole for whole, _ in taken),
            "attention_seconds": statistics.median(inside for _, inside in taken),
            "peak_bytes": peaks[kind],
        }
        for kind, taken in seconds.items()
    }
    pairs = [sum(n * n for n in segments_of(lengths, group, shifted)) for shifted in (False, True)]
    return {
        "lengths": list(lengths),
        "group": group,
        **sides,
        "attention_ratio": sides["s2"]["attention_seconds"] / sides["full"]["attention_seconds"],
        "step_ratio": sides["s2"]["step_seconds"] / sides["full"]["step_seconds"],
        "peak_ratio": sides["s2"]["peak_bytes"] / sides["full"]["peak_bytes"],
        "pairs_ratio": sum(pairs) / (2 * sum(n * n for n in lengths)),
    }


def table(results: dict[str, Any]) -> str:
    """Shifted over full attention, as Markdown."""
    lines = ["| shifted over full | attention | step | peak |", "| --- | ---: | ---: | ---: |"]
    for name, what in (("one row", "one row of 8,192, groups of 2,048"), ("ragged", "five samples of 81 to 3,280")):
        ratios = " | ".join(f"{results[name][f'{kind}_ratio']:.2f}x" for kind in ("attention", "step", "peak"))
        lines.append(f"| {what} | {ratios} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write JSON if asked."""
    parser = measured.arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.manual_seed(0)
    blocks.attention = timed  # type: ignore[assignment]
    decoder, tokens = model(), asked.tokens
    ragged = [int(share * tokens) for share in RAGGED]
    rows = {"one row": [tokens], "ragged": [tokens - sum(ragged[1:]), *ragged[1:]]}
    results: dict[str, Any] = {"machine": measured.machine(), "repeats": asked.repeats, "model": CONFIG}
    for name, lengths in rows.items():
        found = results[name] = compare(decoder, lengths, tokens // 8 * 2, asked.repeats)
        print(f"{name}: attention {found['attention_ratio']:.3f}x, step {found['step_ratio']:.3f}x,"
              f" peak {found['peak_ratio']:.3f}x, score pairs {found['pairs_ratio']:.3f}x", flush=True)  # fmt: skip
    measured.write(results, asked.out)


if __name__ == "__main__":
    main()
