"""Known cards: memory, and the rates from which speed is estimated. From the makers' data sheets."""

import difflib
import re
from dataclasses import dataclass
from typing import Literal

from effitrain.core.errors import InputError


@dataclass(frozen=True)
class Rates:
    """Of a device: half-precision FLOP/s (dense, summed in fp32), memory and host link in bytes/s; disk reads likewise.

    The link's rate is what copies from pinned memory reach: 25 GB/s on PCIe 4.0 x16.
    """

    flops: float
    memory: float
    link: float
    disk: float = 7e9


@dataclass(frozen=True)
class CardData:
    """A card: what CUDA reports as its total in MiB, less than the nominal size by what the driver keeps, and rates."""

    mib: int
    rates: Rates
    half: Literal["bf16", "fp16"] = "bf16"


def _card(
    mib: int, tflops: float, memory_gb: float, link_gb: float, half: Literal["bf16", "fp16"] = "bf16"
) -> CardData:
    return CardData(mib, Rates(tflops * 1e12, memory_gb * 1e9, link_gb * 1e9), half)


_PCIE3, _PCIE4_X8, _PCIE4, _PCIE5 = 12, 12.5, 25, 50
CARDS = {
    "rtx3060": _card(11_900, 25.5, 360, _PCIE4),
    "rtx3080": _card(9_990, 59.5, 760, _PCIE4),
    "rtx3090": _card(24_250, 71, 936, _PCIE4),
    "rtx4060": _card(7_800, 30, 272, _PCIE4_X8),
    "rtx4060ti16": _card(15_950, 44, 288, _PCIE4_X8),
    "rtx4070": _card(11_900, 58, 504, _PCIE4),
    "rtx4070tisuper": _card(15_950, 88, 672, _PCIE4),
    "rtx4080": _card(15_950, 97.5, 717, _PCIE4),
    "rtx4090": _card(24_200, 165, 1008, _PCIE4),
    "rtx5070": _card(11_850, 62, 672, _PCIE5),
    "rtx5080": _card(15_850, 112.5, 960, _PCIE5),
    "rtx5090": _card(32_100, 209.5, 1792, _PCIE5),
    "rtx6000ada": _card(48_500, 364, 960, _PCIE4),
    "t4": _card(14_900, 65, 320, _PCIE3, "fp16"),
    "a10": _card(22_500, 125, 600, _PCIE4),
    "l4": _card(22_500, 121, 300, _PCIE4),
    "a6000": _card(48_500, 155, 768, _PCIE4),
    "l40s": _card(45_400, 362, 864, _PCIE4),
    "a100-40": _card(40_300, 312, 1555, _PCIE4),
    "a100-80": _card(81_000, 312, 2039, _PCIE4),
    "h100": _card(81_000, 989, 3350, _PCIE5),
    "h200": _card(143_000, 989, 4800, _PCIE5),
}
# For a card that is in no table, and where only a budget is named.
TYPICAL = "rtx4090"
# Of one CPU core: 223 GFLOP/s and 16 ms to dequantise 4096 x 4096 weights were measured on two; products reach
# EFFICIENCY of the rate given here.
_CORE_FLOPS, _CORE_DEQUANT_BYTES = 223e9 / 2 / 0.6, 4096**2 * 2.5 / 0.016 / 2


def find_card(name: str) -> CardData:
    """A card by name.

    Raises:
        InputError: not a known card; names the nearest one.
    """
    key = _key(name)
    known = {_key(card): card for card in CARDS}
    if key in known:
        return CARDS[known[key]]
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    raise InputError(
        f"Unknown card {name!r}." + (f" Did you mean {known[nearest[0]]!r}?" if nearest else ""),
        next_step=f"Known: {', '.join(CARDS)}. For any other give its memory: --gpu-mem 20G.",
    )


def rates_of(driver_name: str | None) -> Rates | None:
    """The rates of the card that a driver calls so, such as ``NVIDIA GeForce RTX 4090``; None for one not known."""
    name = re.sub(r"\W+", "-", (driver_name or "").lower())
    matches = [card for card in CARDS if re.search(_pattern(card.partition("-")[0]), name)]
    return CARDS[max(matches, key=len)].rates if matches else None


def _pattern(card: str) -> str:
    """``rtx4090`` as drivers spell it: ``rtx-4090`` between other words."""
    return r"\b" + "-?".join(re.findall(r"[a-z]+|\d+", card)) + r"(?!\d)"


def cpu_rates(cores: int) -> Rates:
    """A CPU as a device: what streams copies memory at a core's own pace."""
    return Rates(cores * _CORE_FLOPS, cores * _CORE_DEQUANT_BYTES, 5e9)


def _key(name: str) -> str:
    plain = "".join(letter for letter in name.lower() if letter.isalnum())
    return plain.removeprefix("nvidia").removeprefix("geforce")
