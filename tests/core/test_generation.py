from dataclasses import replace

from shapes import preset

from effitrain.core.budget import GIB, MemoryBudget
from effitrain.core.generation import texts_at_once
from effitrain.core.ledger import Settings
from effitrain.core.recipe import make_recipe

SETTINGS = Settings(8192, 1, 16, "bf16", "layer", True, "adamw", 2e-4)


def count(tokens: int, gpu: int, settings: Settings = SETTINGS) -> int:
    spec = preset("llama-3.1-8b")
    return texts_at_once(spec, make_recipe({}), settings, MemoryBudget(gpu, 64 * GIB, GIB, "cuda"), tokens)


def test_as_many_as_their_keys_and_values_leave_room_for() -> None:
    """A text of 8,192 tokens takes 32 layers x 2 x 1,024 x 2 B and 4,096 x 2 B a token: 1.06 GiB."""
    each = 8192 * (32 * 2 * 1024 + 4096) * 2
    ten = next(gpu for gpu in range(8 * GIB, 40 * GIB, GIB // 8) if count(8192, gpu) == 10)
    assert count(8192, ten + 5 * each) == 15
    assert count(8192, ten - 10 * each) == 0
    assert count(16384, ten) in (4, 5) and count(4096, ten) >= 20


def test_tiles_leave_more_room() -> None:
    whole = replace(SETTINGS, max_seq_len=32768)
    cards = range(16 * GIB, 24 * GIB, GIB // 4)
    counts = [(count(32768, gpu, whole), count(32768, gpu, replace(whole, mlp_tiles=8))) for gpu in cards]
    assert all(a <= b for a, b in counts) and any(a < b for a, b in counts)
