"""Which layers stream, from where, and the bytes of each: what the ledger and the speed of streaming count with."""

from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

from effitrain.core.layout import NF4, layer_layout
from effitrain.core.ledger import Settings
from effitrain.core.placement import Placement, place
from effitrain.core.recipe import Recipe
from effitrain.core.spec import LayerSpec, ModelSpec

SLOTS = 3  # that streamed layers visit on the device


def blob_bytes(layer: LayerSpec, recipe: Recipe, settings: Settings) -> int:
    """The matrices of a layer in one piece, as they are stored and streamed."""
    return _stored_bytes(layer, NF4 if recipe.quant == NF4 else settings.dtype)


@lru_cache(maxsize=1024)  # asked ten thousand times in the search of a plan
def _stored_bytes(layer: LayerSpec, form: str) -> int:
    return layer_layout(layer, lambda linear: form).nbytes


def placed(spec: ModelSpec, settings: Settings) -> Placement:
    """Which layers stay on the device, wait in host memory or are read from the disk."""
    return place(spec.num_layers, spec.num_layers - settings.streamed, SLOTS, settings.on_disk)


def blobs(spec: ModelSpec, recipe: Recipe, settings: Settings, layers: Iterable[int]) -> list[int]:
    """The blob of each of ``layers``, in bytes."""
    sizes = [blob_bytes(layer, recipe, settings) for layer, _ in spec.shapes]
    return [sizes[spec.kinds[layer]] for layer in layers]


def summed(sizes: list[int]) -> str:
    """How ``sizes`` sum up."""
    return " + ".join(f"{count} layers x {size:,} B" for size, count in Counter(sizes).most_common())
