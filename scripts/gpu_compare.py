"""Streamed against resident on one card in one process: the bits of loss and gradients, and the times of steps.

    python scripts/gpu_compare.py --model llama-3.1-8b --tokens 512,1024,2048,4096 --shares 0,0.5,0.9

Weights are synthetic, both sides compute every layer again, a step is one sample of random tokens; sides take turns and
medians count. Flash attention adds up gradients in any order, so its bits may differ from step to step with nothing
wrong: the bits are compared with torch's plain attention, and of the usual one it is said how far streamed lies from
resident and resident from itself. The result is the last line, as JSON. Without a card it is rehearsed on the CPU.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from effitrain.adapters.attach import attach
from effitrain.adapters.base import AdapterConfig, Clock
from effitrain.core.blobs import SLOTS
from effitrain.core.placement import Placement, place
from effitrain.core.recipe import Recipe, make_recipe
from effitrain.data.batches import MicroBatch
from effitrain.model.load import Base, find_base, load_model
from effitrain.report.files import stream_figures
from effitrain.stream.engine import Traffic
from effitrain.train.loop import accumulate
from effitrain.train.memory import device_allocations

REPEATS = 5


class Side:
    """A model whose adapters change what it says, ready to step."""

    def __init__(self, base: Base, recipe: Recipe, device: torch.device, placement: Placement | None = None):
        self.device, self.clock = device, Clock(recipe.seed)
        self.decoder = load_model(base, recipe, device, placement=placement)
        self.decoder.set_recompute("layer")
        attach(self.decoder, AdapterConfig.of(recipe), self.clock)
        self.parameters = [p for p in self.decoder.parameters() if p.requires_grad]
        source = torch.Generator().manual_seed(recipe.seed)
        with torch.no_grad():
            for parameter in self.parameters:
                parameter += 0.01 * torch.randn(parameter.shape, generator=source).to(device)

    def step(self, batch: MicroBatch) -> list[Tensor]:
        """The loss, and the gradient of every adapter tensor."""
        for parameter in self.parameters:
            parameter.grad = None
        loss = accumulate(self.decoder, [batch], self.clock, self.parameters)
        assert all(parameter.grad is not None for parameter in self.parameters)
        return [torch.tensor(loss), *(p.grad for p in self.parameters if p.grad is not None)]

    def seconds(self, batch: MicroBatch) -> float:
        """Time of a step, until the device is done."""
        self.finish()
        started = time.perf_counter()
        self.step(batch)
        self.finish()
        return time.perf_counter() - started

    def traffic(self) -> Traffic:
        """What was copied so far."""
        self.finish()
        assert self.decoder.streamer is not None
        return replace(self.decoder.streamer.traffic)

    def finish(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def compare(model: str, tokens: Sequence[int], shares: Sequence[float]) -> dict[str, Any]:
    """Streamed against resident, with each of ``shares`` of the layers resident, at ``tokens`` of a micro-batch.

    ``equal``: with plain attention, loss and gradients have the bits of a resident step, and so has a second one.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = find_base(model, "synthetic")
    recipe = make_recipe({"model": model, "dtype": "bf16" if device.type == "cuda" else "fp32"})
    batches = [micro_batch(count, base.spec.vocab) for count in tokens]
    resident, bits, rows = Side(base, recipe, device), [], []
    for share in shares:
        kept = int(share * base.spec.num_layers)  # down: with no more layers than slots nothing would be copied
        streamed = Side(base, recipe, device, place(base.spec.num_layers, kept, SLOTS))
        bits.append({"resident_layers": kept, **_bits(resident, streamed, batches[0])})
        rows += [{"resident_layers": kept, **_times(resident, streamed, batch)} for batch in batches]
        del streamed  # its slots, before there are the next one's
    return {"equal": all(found["plain"] == found["plain_again"] == 0 for found in bits), "bits": bits, "times": rows}


def micro_batch(tokens: int, vocab: int) -> MicroBatch:
    """One sample of random tokens; the last has nothing to predict."""
    ids = torch.randint(0, vocab, (tokens,), generator=torch.Generator().manual_seed(tokens))
    labels, places = ids.roll(-1), torch.arange(tokens)
    labels[-1] = -100
    return MicroBatch(ids, labels, places, (tokens,), places[:-1], 1)


def _bits(resident: Side, streamed: Side, batch: MicroBatch) -> dict[str, Any]:
    """Greatest differences of streamed from resident, and of resident from itself (``again``); 0 is the same bits."""
    with sdpa_kernel(SDPBackend.MATH):
        plain = resident.step(batch)
        found = {"plain": _apart(plain, streamed.step(batch)), "plain_again": _apart(plain, resident.step(batch))}
    usual = resident.step(batch)
    found |= {"usual": _apart(usual, streamed.step(batch)), "usual_again": _apart(usual, resident.step(batch))}
    return {"tokens": len(batch.input_ids), **found, "greatest_gradient": max(_size(part) for part in plain[1:])}


def _apart(one: list[Tensor], other: list[Tensor]) -> float:
    return max(_size(a - b) for a, b in zip(one, other, strict=True))


def _size(part: Tensor) -> float:
    return part.abs().max().item()


def _times(resident: Side, streamed: Side, batch: MicroBatch) -> dict[str, Any]:
    """Seconds of a step on either side, and what was copied in the streamed ones."""
    sides = (resident, streamed)
    for side in sides:
        side.step(batch)
    before, layers, device = streamed.traffic(), len(streamed.decoder.layers), streamed.decoder.device
    asked = device_allocations(device)
    alone, visiting = (
        statistics.median(column)
        for column in zip(*([side.seconds(batch) for side in sides] for _ in range(REPEATS)), strict=True)
    )
    streamer = streamed.decoder.streamer
    assert streamer is not None
    count = len(streamer.linears)
    allocations = None if asked is None else (device_allocations(device) or 0) - asked
    copied = (before, streamed.traffic(), count, layers - count, 1, streamer.host.written(), allocations)
    return {
        "tokens": len(batch.input_ids),
        "resident_step_seconds": alone,
        "streamed_step_seconds": visiting,
        "step_time_over_resident": round(visiting / alone, 4),
        "steps": REPEATS,
        **stream_figures(*copied),
    }


def main() -> None:
    """Parse the command line, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--tokens", type=_numbers(int), default=(512, 1024, 2048, 4096))
    parser.add_argument("--shares", type=_numbers(float), default=(0.0, 0.5, 0.9), help="of layers that stay")
    args = parser.parse_args()
    print(json.dumps(compare(args.model, args.tokens, args.shares)))


def _numbers(kind: type) -> Any:
    return lambda text: tuple(map(kind, text.split(",")))


if __name__ == "__main__":
    main()
