"""How many bytes a run may take on the device and on the host."""

import difflib
from dataclasses import dataclass
from typing import Literal

from effitrain.core.errors import InputError
from effitrain.core.recipe import Recipe
from effitrain.core.units import format_bytes

GIB = 2**30

# What CUDA reports as a card's total, in MiB: less than the nominal size, the driver keeps a part.
_CARD_MIB = {
    "rtx3060": 11_900,
    "rtx3080": 9_990,
    "rtx3090": 24_250,
    "rtx4060": 7_800,
    "rtx4060ti16": 15_950,
    "rtx4070": 11_900,
    "rtx4070tisuper": 15_950,
    "rtx4080": 15_950,
    "rtx4090": 24_200,
    "rtx5070": 11_850,
    "rtx5080": 15_850,
    "rtx5090": 32_100,
    "rtx6000ada": 48_500,
    "t4": 14_900,
    "a10": 22_500,
    "l4": 22_500,
    "a6000": 48_500,
    "l40s": 45_400,
    "a100-40": 40_300,
    "a100-80": 81_000,
    "h100": 81_000,
    "h200": 143_000,
}

_BEFORE_AMPERE = {"t4"}

# Context, cuBLAS workspace and allocator slack of one CUDA process, where they cannot be measured.
CUDA_OVERHEAD_BYTES = GIB * 12 // 10
# Share of the free host memory that a run takes by default.
_HOST_SHARE = (8, 10)


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes a run may take. ``overhead_bytes`` is the context and slack inside ``gpu_bytes``; 0 on a CPU.

    On a CPU ``gpu_bytes`` counts the tensors of the step. ``notice`` tells of a budget that was clipped;
    ``half`` is the half precision that the card computes in, bf16 since Ampere.
    """

    gpu_bytes: int
    host_bytes: int
    overhead_bytes: int
    device: Literal["cpu", "cuda"]
    card: str | None = None
    notice: str = ""
    half: Literal["bf16", "fp16"] = "bf16"


def card_bytes(name: str) -> int:
    """Total memory of a known card, as CUDA reports it.

    Raises:
        InputError: not a known card; names the nearest one.
    """
    key = _card_key(name)
    known = {_card_key(card): card for card in _CARD_MIB}
    if key in known:
        return _CARD_MIB[known[key]] * 2**20
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    raise InputError(
        f"Unknown card {name!r}." + (f" Did you mean {known[nearest[0]]!r}?" if nearest else ""),
        next_step=f"Known: {', '.join(_CARD_MIB)}. For any other give its memory: --gpu-mem 20G.",
    )


def make_budget(
    recipe: Recipe, device: Literal["cpu", "cuda"], gpu_free: int, host_free: int, card: str | None = None
) -> MemoryBudget:
    """The budget of a run: what the recipe says, else what the named card holds, else what is free here.

    Args:
        device: where the run would take place; a card named by the recipe makes it ``cuda``.
        gpu_free: bytes free on the card found here; ignored on a CPU.
        host_free: bytes of host memory free here.
        card: name of the card found here.

    Raises:
        InputError: the recipe names an unknown card.
    """
    host_share = host_free * _HOST_SHARE[0] // _HOST_SHARE[1]
    host_bytes = recipe.host_mem or host_share
    if recipe.gpu:
        device, card, gpu_free = "cuda", recipe.gpu, card_bytes(recipe.gpu)
    if device == "cpu":
        return MemoryBudget(recipe.gpu_mem or host_share, host_bytes, 0, "cpu")
    asked = recipe.gpu_mem or gpu_free
    notice = ""
    if asked > gpu_free:
        has = f"{card or 'the card'} has {format_bytes(gpu_free)}"
        notice = f"The budget {format_bytes(asked)} is clipped: {has}."
    half: Literal["bf16", "fp16"] = "fp16" if _card_key(card or "") in _BEFORE_AMPERE else "bf16"
    return MemoryBudget(min(asked, gpu_free), host_bytes, CUDA_OVERHEAD_BYTES, "cuda", card, notice, half)


def _card_key(name: str) -> str:
    plain = "".join(letter for letter in name.lower() if letter.isalnum())
    return plain.removeprefix("nvidia").removeprefix("geforce")
