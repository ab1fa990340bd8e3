"""Streamed training against resident, on a CPU with a link as slow as asked: what the schedule hides, and what
layer-major accumulation saves.

    OMP_NUM_THREADS=1 python scripts/bench_stream.py --out benchmarks/stream.json

One thread computes, one copies. The model is a random Llama in NF4; the resident side recomputes each layer too. First
the forward pass of a layer is timed; then the link is made so slow that copying a layer takes a share of that:

- at 0.8 the copies should hide: a step takes at most 1.15 times the resident one;
- at 3 they cannot: with 4 micro-batches all passing a layer before the next is fetched, a step is at least twice as
  fast as with one micro-batch after the other. "orders" takes 3 times a layer's forward pass for the step's tokens,
  "orders_of_one" 3 times that for one micro-batch. There computing the step takes longer than copying it once, and
  bounds the gain: with a backward pass of b times the forward it is 24 / (4 + 4 b) at most. Small NF4 layers have
  b = 2.2, so 1.9 is the most; wide plain ones b = 1.9, so 2.1 is. Those are run (`benchmarks/slow_checks.md`).

Sides take turns and medians over the repeats are reported, so that other programs' load meets all of them.
"speedup_alone" is made of processor times, which others do not lengthen: what the copies of the micro-batch order take,
each 3 forward passes of a layer, over what the layer order computes and its first copy; with no computation beside the
copies it is the least that the gain may be.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from study import measured

from effitrain.adapters.attach import attach
from effitrain.adapters.base import AdapterConfig, Clock
from effitrain.core.placement import Placement, place
from effitrain.core.spec import spec_from_config
from effitrain.data.batches import MicroBatch
from effitrain.io.synthetic import SyntheticCheckpoint, shapes_of
from effitrain.model.decoder import Decoder, build
from effitrain.model.load import fill, stream
from effitrain.stream.fresh import FreshLayers
from effitrain.train.loop import accumulate

CPU = torch.device("cpu")
CONFIG = {
    "model_type": "llama",
    "vocab_size": 500,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
WIDE = {**CONFIG, "hidden_size": 1024, "intermediate_size": 2816}
ORDERS = ("micro-batch", "layer")


@dataclass(frozen=True)
class Shape:
    """What is run: a config without its depth, layers, tokens of a micro-batch, storage of the weights, rank."""

    config: dict
    layers: int
    tokens: int
    quant: str = "nf4"
    rank: int = 16


class Side:
    """A model with adapters that takes steps and times them."""

    def __init__(self, shape: Shape, placement: Placement | None = None, bytes_per_second: float | None = None):
        config = {**shape.config, "num_hidden_layers": shape.layers}
        spec = spec_from_config(config, "bench")
        weights = SyntheticCheckpoint(shapes_of(spec), 0, shape.quant == "nf4", torch.float32)
        self.decoder: Decoder = build(spec, config, "bench")
        fill(self.decoder, weights, shape.quant, torch.float32, CPU, streamed=placement.streamed if placement else ())
        if placement:
            source = FreshLayers(spec, weights, shape.quant, "fp32")
            stream(self.decoder, source, placement, CPU, bytes_per_second=bytes_per_second)
        self.decoder.set_recompute("layer")
        self.clock = Clock()
        attach(self.decoder, AdapterConfig(r=shape.rank), self.clock)
        self.seconds: dict[int, list[float]] = {}
        self.processor_seconds: dict[int, list[float]] = {}

    def step(self, micro: list[MicroBatch], at_once: int = 1) -> float:
        """The loss; its time is noted, and the processor time of the thread that computes."""
        started, processor = time.perf_counter(), time.thread_time()
        loss = accumulate(self.decoder, micro, self.clock, (), at_once)
        self.processor_seconds.setdefault(at_once, []).append(time.thread_time() - processor)
        self.seconds.setdefault(at_once, []).append(time.perf_counter() - started)
        for parameter in self.decoder.parameters():
            parameter.grad = None
        return loss

    def median(self, at_once: int = 1) -> float:
        """Seconds of a step; the first one warms up."""
        return statistics.median(self.seconds[at_once][1:])


def micro_batch(tokens: int, seed: int) -> MicroBatch:
    """One sample of random tokens, every one trained."""
    ids = torch.randint(0, CONFIG["vocab_size"], (tokens,), generator=torch.Generator().manual_seed(seed))
    places = torch.arange(tokens)
    return MicroBatch(ids, ids.roll(-1), places, (tokens,), places, 1)


def forward_seconds(side: Side, batch: MicroBatch, clock: Callable[[], float] = time.perf_counter) -> float:
    """Of one layer's forward pass, the median of several."""
    found = []
    with torch.no_grad():
        for _ in range(7):
            started = clock()
            side.decoder(batch.input_ids, batch.position_ids, batch.segments)
            found.append((clock() - started) / len(side.decoder.layers))
    return statistics.median(found)


def hidden(args: argparse.Namespace, share: float) -> dict:
    """Streamed against resident, with copies that take ``share`` of a layer's forward pass."""
    shape = Shape(CONFIG, args.layers, args.tokens)
    batch, resident = micro_batch(args.tokens, 0), Side(shape)
    forward = forward_seconds(resident, batch)
    streamed = Side(shape, place(args.layers, 0, args.slots), _speed(shape, forward * share))
    losses = set()
    for _ in range(args.repeats + 1):
        losses |= {resident.step([batch]), streamed.step([batch])}
    traffic = streamed.decoder.streamer.traffic  # type: ignore[union-attr]
    return {
        "copy_over_forward": share,
        "layer_forward_seconds": forward,
        "resident_step_seconds": resident.median(),
        "streamed_step_seconds": streamed.median(),
        "ratio": streamed.median() / resident.median(),
        "hidden_share": traffic.hidden_share,
        "equal_losses": len(losses) == 1,
    }


def orders(args: argparse.Namespace, shape: Shape, share: float, micro: int, timed: int, repeats: int) -> dict:
    """Layer-major against micro-batch order with ``micro`` micro-batches, with copies that take ``share`` of a layer's
    forward pass for ``timed`` of them.
    """
    batches = [micro_batch(shape.tokens, seed) for seed in range(micro)]
    few = Side(replace(shape, layers=4))
    forward = timed * forward_seconds(few, batches[0])
    alone = share * timed * forward_seconds(few, batches[0], time.thread_time)
    side = Side(shape, place(shape.layers, 0, args.slots), _speed(shape, forward * share))
    losses = set()
    for _ in range(repeats + 1):
        losses |= {side.step(batches), side.step(batches, micro)}
    seconds = dict(zip(ORDERS, (side.median(), side.median(micro)), strict=True))
    computed = statistics.median(side.processor_seconds[micro][1:])
    copies = 2 * micro * (shape.layers - args.slots)
    return {
        "copy_over_forward": share,
        "micro_batches": micro,
        "layers": shape.layers,
        "hidden_size": shape.config["hidden_size"],
        "tokens": shape.tokens,
        "quant": shape.quant,
        "rank": shape.rank,
        "layer_forward_seconds": forward / timed,
        "step_seconds": seconds,
        "speedup": seconds["micro-batch"] / seconds["layer"],
        "speedup_alone": copies * alone / (computed + alone),
        "equal_losses": len(losses) == 1,
    }


def _speed(shape: Shape, seconds: float) -> float:
    """Bytes a second that make a layer's copy take ``seconds``."""
    side = Side(replace(shape, layers=1), place(1, 0, 1))
    return side.decoder.streamer.host.source.layout(0).nbytes / seconds  # type: ignore[union-attr]


def main() -> None:
    """Parse the command line, measure, print."""
    parser = measured.arguments(__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--deep", type=int, default=64, help="layers of the wide model of orders_of_one")
    parser.add_argument("--deep-repeats", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = {
        "machine": measured.machine(),
        "model": {**CONFIG, "num_hidden_layers": args.layers, "tokens": args.tokens, "slots": args.slots},
        "hidden": hidden(args, 0.8),
        "orders": orders(args, Shape(CONFIG, args.layers, args.tokens), 3.0, 4, 4, args.repeats),
        "orders_of_one": orders(args, Shape(WIDE, args.deep, args.tokens, "none", 8), 3.0, 4, 1, args.deep_repeats),
    }
    measured.write(report, args.out)


if __name__ == "__main__":
    main()
