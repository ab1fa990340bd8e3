"""Measure tile sizes on this machine's card and write what is fastest to kernels/tiles.json, under its architecture.

    python -P scripts/tune_kernels.py            # minutes; then: python -P tests/aot/test_compile.py
    python -P scripts/tune_kernels.py --dry-run  # show, do not write

A choice holds for the shapes of an 8B and a 70B layer together: the smallest sum of times counts. A kernel that is not
faster than cuBLAS with a second pass is not chosen. Tiles that this card cannot launch, or that spill, are passed over.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, astuple, replace
from functools import partial
from itertools import product
from typing import Any

import torch

from effitrain.evals import bench_kernels, kernels
from effitrain.evals.bench_cases import LLAMA_8B, LLAMA_70B, Shapes
from effitrain.kernels import lora_linear, nf4_dequantize, nf4_linear, tiles
from effitrain.kernels.tiles import Tile, Tiles, all_tiles

BLOCKS = (8, 16, 32, 64, 128)
TOKENS = (16, 64, 256, 1024, 4096)  # up to which an NF4 product may have a tile of its own
FEW = tuple(Tile(16, n, 64, w, s) for n, w, s in product((32, 64, 128), (2, 4, 8), (2, 3, 4, 5)))
MANY = tuple(Tile(m, n, 64, w, s) for m, n, w, s in product((32, 64, 128), (64, 128), (4, 8), (2, 3, 4)))
LORA = tuple(
    Tile(m, n, k, w, s) for m, n, k, w, s in product((64, 128), (64, 128, 256), (32, 64), (4, 8), (2, 3, 4))
)  # fmt: skip
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Use = Callable[[Tiles], float]


def main() -> None:
    """Tune one choice after the other, each with the others as they are by then."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="show the choices and write nothing")
    args = parser.parse_args()
    if not torch.cuda.is_available() or not kernels.runs_on(DEVICE):
        sys.exit("No card here that runs the kernels: nothing to tune.")
    make = kernels.Maker(DEVICE, torch.bfloat16, torch.Generator().manual_seed(0))
    found = tune(make, (LLAMA_8B, LLAMA_70B), all_tiles()["default"])
    name = "sm_{}{}".format(*torch.cuda.get_device_capability())
    stored = json.loads(tiles.FILE.read_text(encoding="utf-8"))
    stored[name] = {key: value for key, value in as_json(found).items() if value != stored["default"][key]}
    print(json.dumps({name: stored[name]}, indent=2))
    if not args.dry_run:
        tiles.FILE.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
        print(f"Written to {tiles.FILE}. Now: python -P tests/aot/test_compile.py")


def tune(make: kernels.Maker, shapes: Iterable[Shapes], start: Tiles) -> Tiles:
    """The fastest choices, beginning from ``start``."""
    layers = [(s, make.linear(s.ffn, s.hidden, s.rank)) for s in shapes]

    def dequantize(chosen: Tiles) -> float:
        call = partial(nf4_dequantize.nf4_dequantize, dtype=make.dtype)
        return sum(timed(chosen, call, [linear.base.weight]) for _, linear in layers)  # type: ignore[attr-defined]

    def multiply(tokens: int, chosen: Tiles) -> float:
        weights = [(s, linear.base.weight) for s, linear in layers]  # type: ignore[attr-defined]
        inputs = [(make.randn(tokens, s.hidden), make.randn(tokens, s.ffn), weight) for s, weight in weights]
        return sum(timed(chosen, both_ways, rows) for rows in inputs)

    def update(chosen: Tiles) -> float:
        rows = [(make.randn(s.tokens, s.hidden), linear) for s, linear in layers]
        return sum(timed(chosen, lora_linear.project, [x, linear]) for x, linear in rows)

    best = fastest(dequantize, [replace(start, dequantize_blocks=n) for n in BLOCKS])
    rows: tuple[tuple[int, Tile], ...] = ()
    for tokens in TOKENS:
        fused = [((tokens, tile),) for tile in (FEW if tokens <= 16 else MANY)]
        chosen = fastest(partial(multiply, tokens), [replace(best, nf4=nf4) for nf4 in ((), *fused)]).nf4
        if not chosen:  # it is faster to dequantise first, and with more tokens the more so
            break
        rows += chosen
    best = replace(best, nf4=rows)
    return fastest(update, [best, *(replace(best, lora_fused=True, lora=tile) for tile in LORA)])


def both_ways(x: torch.Tensor, grad: torch.Tensor, weight: Any) -> None:
    """The products with a weight that training asks for."""
    nf4_linear.product(x, weight)
    nf4_linear.transposed_product(grad, weight)


def fastest(use: Use, candidates: Iterable[Tiles]) -> Tiles:
    """The candidate with which ``use`` takes the least time."""
    times = [(use(candidate), candidate) for candidate in candidates]
    return min(times, key=lambda pair: pair[0])[1]


def timed(chosen: Tiles, call: Callable[..., Any], inputs: list[Any]) -> float:
    """Seconds of ``call`` under ``chosen`` tiles; infinite where they cannot be launched."""
    rooms = (nf4_dequantize, nf4_linear, lora_linear)
    for room in rooms:
        room.tiles_for = lambda device: chosen  # type: ignore[assignment]
    try:
        return bench_kernels.measure(call, lambda: inputs, DEVICE)[0]
    except Exception as problem:  # out of registers or shared memory: triton has several errors for it
        print(f"passed over: {type(problem).__name__}", file=sys.stderr)
        return float("inf")
    finally:
        for room in rooms:
            room.tiles_for = tiles.tiles_for


def as_json(found: Tiles) -> dict[str, Any]:
    """The table as it stands in the file: a tile is its numbers in order."""
    nf4 = [[most, list(astuple(tile))] for most, tile in found.nf4]
    return {**asdict(found), "nf4": nf4, "lora": list(astuple(found.lora))}


if __name__ == "__main__":
    main()
