"""The search: every combination of settings the recipe leaves open, their ledgers, and the fastest that fits."""

from collections.abc import Iterator
from dataclasses import dataclass

from effitrain.core.budget import MemoryBudget
from effitrain.core.ledger import LedgerLine, Settings, gpu_bytes, host_bytes
from effitrain.core.memory import make_ledger
from effitrain.core.recipe import Recipe
from effitrain.core.spec import ModelSpec

SAMPLES_PER_STEP = 16
DEFAULT_MAX_SEQ_LEN = 2048
ADAPTER_LR = 2e-4
# Beyond this many tokens a CPU gains no speed from a larger micro-batch.
CPU_MICRO_BATCH_TOKENS = 4096
# One dequantisation takes the time of so many FLOP per weight: 2.5 B at 1 TB/s against 99 TFLOP/s on an RTX 4090 is
# 249; on two CPU cores 16 ms for 4096 x 4096 weights against 223 GFLOP/s is 213.
DEQUANT_FLOP = 250


@dataclass(frozen=True)
class Choice:
    """Settings with their ledger."""

    settings: Settings
    ledger: tuple[LedgerLine, ...]

    @property
    def peak(self) -> int:
        """Bytes on the device."""
        return gpu_bytes(self.ledger)

    @property
    def host_peak(self) -> int:
        """Bytes on the host."""
        return host_bytes(self.ledger)

    def fits(self, budget: MemoryBudget) -> bool:
        """Whether both peaks are within the budget."""
        return self.peak <= budget.gpu_bytes and self.host_peak <= budget.host_bytes


def list_choices(spec: ModelSpec, recipe: Recipe, budget: MemoryBudget) -> list[Choice]:
    """Every combination of what the recipe leaves open; one only when it fixes everything."""
    candidates = _candidates(spec, recipe, budget)
    return [Choice(settings, make_ledger(spec, recipe, settings, budget)) for settings in candidates]


def fastest(choices: list[Choice], recipe: Recipe, budget: MemoryBudget) -> Choice:
    """The fastest choice within the device budget, of equals the largest micro-batch; the leanest when none is."""
    fitting = [choice for choice in choices if choice.peak <= budget.gpu_bytes]
    if not fitting:
        return leanest(choices)
    return min(fitting, key=lambda choice: (time_per_token(choice.settings, recipe), -choice.settings.tokens))


def leanest(choices: list[Choice]) -> Choice:
    """The choice of the smallest peak."""
    return min(choices, key=lambda choice: choice.peak)


def time_per_token(settings: Settings, recipe: Recipe) -> float:
    """Time of a token in FLOP per frozen weight: its matrix products and its share of the dequantisations.

    Forward and gradient of the input take 2 FLOP each, and recomputing the forward 2 more; the weight is
    dequantised once for each.
    """
    products = 3 if settings.recompute == "layer" else 2
    dequantised = products * DEQUANT_FLOP / settings.tokens if recipe.quant == "nf4" else 0
    return 2 * products + dequantised


def sequence_length(spec: ModelSpec, recipe: Recipe) -> int:
    """Tokens of a sample: the recipe's, else the model's length, at most 2048."""
    return recipe.max_seq_len or min(spec.max_positions, DEFAULT_MAX_SEQ_LEN)


def _candidates(spec: ModelSpec, recipe: Recipe, budget: MemoryBudget) -> Iterator[Settings]:
    length = sequence_length(spec, recipe)
    dtype = recipe.dtype if recipe.dtype != "auto" else budget.half if budget.device == "cuda" else "fp32"
    for recompute in ("none", "layer") if recipe.recompute == "auto" else (recipe.recompute,):
        for batch_size in _batch_sizes(recipe, length, budget.device):
            yield Settings(
                max_seq_len=length,
                batch_size=batch_size,
                grad_accum=recipe.grad_accum or max(1, round(SAMPLES_PER_STEP / batch_size)),
                dtype=dtype,
                recompute=recompute,
                offload=recipe.offload_activations == "on",
                optimizer=recipe.optimizer or "adamw",
                lr=recipe.lr or ADAPTER_LR,
            )


def _batch_sizes(recipe: Recipe, length: int, device: str) -> list[int]:
    """The recipe's micro-batch, or powers of two up to the samples of a step."""
    if recipe.batch_size:
        return [recipe.batch_size]
    most = max(1, SAMPLES_PER_STEP // (recipe.grad_accum or 1))
    if device == "cpu":
        most = min(most, max(1, CPU_MICRO_BATCH_TOKENS // length))
    return [2**power for power in range(most.bit_length())]
