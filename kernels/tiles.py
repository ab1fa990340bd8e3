"""Tile sizes of the kernels by architecture: measured by ``scripts/tune_kernels.py``, never tuned at run time.

``tiles.json`` beside this file holds ``default``, a conservative choice that compiles without spills and within shared
memory on every card from sm_80 on, and for each measured architecture what differs from it.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from effitrain.kernels.backend import capability

FILE = Path(__file__).with_name("tiles.json")


@dataclass(frozen=True)
class Tile:
    """A program's share of a product [M, N] over K: rows, columns and depth of its block, warps, pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """The choices for one architecture.

    Attributes:
        dequantize_blocks: blocks of 64 weights a program of ``nf4_dequantize`` turns into floats.
        nf4: for up to so many tokens, the tile with which ``nf4_linear`` never writes the weight out, ascending; beyond
            the last it dequantises and leaves the product to cuBLAS. ``k`` is a multiple of 64, a block of NF4.
        lora_fused: whether ``lora_linear`` on a plain weight adds the low-rank term inside our own product; else
            cuBLAS multiplies and the term is added in a second pass.
        lora: tile of that product.
    """

    dequantize_blocks: int
    nf4: tuple[tuple[int, Tile], ...]
    lora_fused: bool
    lora: Tile

    def nf4_tile(self, tokens: int) -> Tile | None:
        """The tile of a fused product with ``tokens`` rows; None where the weight is better dequantised first."""
        return next((tile for most, tile in self.nf4 if tokens <= most), None)


@cache
def tiles_for(device: torch.device) -> Tiles:
    """The table of the card, or the conservative one."""
    tables = all_tiles()
    if device.type != "cuda":
        return tables["default"]
    return tables.get("sm_{}{}".format(*capability(device)), tables["default"])


def all_tiles() -> dict[str, Tiles]:
    """Every table in the file, by ``default`` or architecture, such as ``sm_89``."""
    stored = json.loads(FILE.read_text(encoding="utf-8"))
    return {name: _tiles({**stored["default"], **changed}) for name, changed in stored.items()}


def _tiles(fields: dict[str, Any]) -> Tiles:
    nf4 = tuple((most, Tile(*tile)) for most, tile in fields["nf4"])
    return Tiles(**{**fields, "nf4": nf4, "lora": Tile(*fields["lora"])})
