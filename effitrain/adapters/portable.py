"""An adapter in the one form that peft, vLLM and llama.cpp read alike: the same rank everywhere, and a scale of one.

Their rules differ otherwise: peft scales each linear by alpha / r of its own patterns, vLLM all by one alpha / r, blind
to patterns, llama.cpp each by alpha over the rank that it finds in the file.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from effitrain.adapters.base import AdapterConfig
from effitrain.core.errors import InputError

Factors = Mapping[str, tuple[Tensor, Tensor]]


def one_rank(
    factors: Factors, scaling: Callable[[str, int], float]
) -> tuple[AdapterConfig, dict[str, tuple[Tensor, Tensor]]]:
    """The same updates, the scale in B and every rank filled up with zeros to the largest.

    Args:
        factors: B [out, r] and A [r, in] in float32 by module path; r may differ.
        scaling: the factor on the update of a path with its rank.

    Returns:
        The config, whose alpha is its rank, and the factors.
    """
    rank = max(len(A) for _, A in factors.values())
    filled = {
        path: (pad(B * scaling(path, len(A)), (0, rank - len(A))), pad(A, (0, 0, 0, rank - len(A))))
        for path, (B, A) in factors.items()
    }
    return AdapterConfig(r=rank, alpha=rank, targets=tuple(factors)), filled


def check_alive(factors: Factors, source: str) -> None:
    """Refuse to train on from filled-up ranks: where a column of B and its row of A are zero, so are their gradients.

    Raises:
        InputError: names the first such linear.
    """
    for path, (B, A) in factors.items():
        if bool((~B.any(dim=0) & ~A.any(dim=1)).any()):
            raise InputError(
                f"{source} has ranks of zeros at {path}, which could never learn.",
                "It was filled up to one rank for other programs.",
                "Go on from the adapter that it was made from.",
            )


def for_peft_alone(full: Collection[str], positions: Mapping[str, Any] | None) -> Iterator[str]:
    """What beside an adapter's factors other programs do not take, and what to do.

    Args:
        full: norms and embedding that were trained in full, by path.
        positions: the scaled config.json, if positions are not the base's own.
    """
    if full:
        yield (
            f"{len(full)} norms and embeddings were trained in full: peft loads them, vLLM and llama.cpp do not."
            " For those: --to merged."
        )
    if positions:
        yield (
            "Positions are scaled: config.json beside the adapter is the base's with them, for peft. vLLM and llama.cpp"
            " would use the base's own. For those: --to merged."
        )
