"""How many bytes a run may take on the device and on the host."""

from dataclasses import dataclass, replace
from typing import Literal

from effitrain.core.cards import CARDS, TYPICAL, Rates, cpu_rates, find_card, rates_of
from effitrain.core.recipe import Recipe
from effitrain.core.units import format_bytes

GIB = 2**30

# Context, cuBLAS workspace and allocator slack of one CUDA process, where they cannot be measured.
CUDA_OVERHEAD_BYTES = GIB * 12 // 10
# Where the context of the process is measured: for kernels and libraries that load later, and the allocator's slack.
CUDA_SLACK_BYTES = GIB * 6 // 10
# Share of the free host memory that a run takes by default.
_HOST_SHARE = (8, 10)
# Share of what is free now that is counted on to be free for the next command.
_STEADY_SHARE = (98, 100)


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes a run may take. ``overhead_bytes`` is the context and slack inside ``gpu_bytes``; 0 on a CPU.

    On a CPU ``gpu_bytes`` counts the tensors of the step. ``notices`` tell of a budget that was clipped or assumed;
    ``half`` is the half precision that the card computes in, bf16 since Ampere; ``rates`` are what speed is estimated
    from, of a typical card where this one is not known.
    """

    gpu_bytes: int
    host_bytes: int
    overhead_bytes: int
    device: Literal["cpu", "cuda"]
    card: str | None = None
    notices: tuple[str, ...] = ()
    half: Literal["bf16", "fp16"] = "bf16"
    rates: Rates = CARDS[TYPICAL].rates

    @property
    def where(self) -> str:
        """What ``gpu_bytes`` counts, in words."""
        return "on the device" if self.device == "cuda" else "in tensors"


def card_bytes(name: str) -> int:
    """Total memory of a known card, as CUDA reports it.

    Raises:
        InputError: not a known card; names the nearest one.
    """
    return find_card(name).mib * 2**20


def make_budget(
    recipe: Recipe,
    device: Literal["cpu", "cuda"],
    gpu_free: int,
    host_free: int,
    card: str | None = None,
    cores: int = 1,
) -> MemoryBudget:
    """The budget of a run: what the recipe says, else what the named card holds, else what is free here.

    Args:
        device: where the run would take place; a card named by the recipe makes it ``cuda``.
        gpu_free: bytes free on the card found here; ignored on a CPU.
        host_free: bytes of host memory free here.
        card: name of the card found here.
        cores: of the CPU found here.

    Raises:
        InputError: the recipe names an unknown card.
    """
    host_share = host_free * _HOST_SHARE[0] // _HOST_SHARE[1]
    host_bytes = recipe.host_mem or host_share
    if recipe.gpu:
        device, card, gpu_free = "cuda", recipe.gpu, card_bytes(recipe.gpu)
    if device == "cpu":
        return MemoryBudget(recipe.gpu_mem or host_share, host_bytes, 0, "cpu", rates=cpu_rates(cores))
    asked = recipe.gpu_mem or gpu_free
    notices: tuple[str, ...] = ()
    if asked > gpu_free:
        has = f"{card or 'the card'} has {format_bytes(gpu_free)}"
        notices = (f"The budget {format_bytes(asked)} is clipped: {has}.",)
    half = find_card(recipe.gpu).half if recipe.gpu else "bf16"
    rates = find_card(recipe.gpu).rates if recipe.gpu else rates_of(card) or CARDS[TYPICAL].rates
    return MemoryBudget(min(asked, gpu_free), host_bytes, CUDA_OVERHEAD_BYTES, "cuda", card, notices, half, rates)


def with_margin(budget: MemoryBudget, recipe: Recipe) -> MemoryBudget:
    """``budget`` less what may not be free any more when the next command asks; what ``recipe`` names stays."""
    part, whole = _STEADY_SHARE
    gpu, host = budget.gpu_bytes * part // whole, budget.host_bytes * part // whole
    named = recipe.gpu_mem or recipe.gpu
    return replace(
        budget, gpu_bytes=budget.gpu_bytes if named else gpu, host_bytes=budget.host_bytes if recipe.host_mem else host
    )
