import pytest

from effitrain.core.budget import CUDA_OVERHEAD_BYTES, GIB, MemoryBudget, card_bytes, make_budget
from effitrain.core.cards import cpu_rates
from effitrain.core.errors import InputError
from effitrain.core.recipe import make_recipe


@pytest.mark.parametrize("name", ["rtx4090", "RTX 4090", "NVIDIA GeForce RTX 4090", "rtx-4090", "RTX_4090"])
def test_a_card_is_known_as_people_write_it(name: str) -> None:
    assert card_bytes(name) == card_bytes("rtx4090")


@pytest.mark.parametrize(
    ("name", "nominal"),
    {"rtx3060": 12, "rtx4060ti16": 16, "rtx4090": 24, "rtx5090": 32, "l4": 24, "a100-40": 40, "h100": 80}.items(),
)
def test_a_card_holds_a_little_less_than_its_name_says(name: str, nominal: int) -> None:
    assert 0.9 * nominal * GIB < card_bytes(name) < nominal * GIB


def test_an_unknown_card_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"Unknown card 'rtx4900'\. Did you mean 'rtx4090'") as caught:
        card_bytes("rtx4900")
    assert "h100" in caught.value.next_step and "--gpu-mem" in caught.value.next_step


def test_a_card_like_no_other_gets_the_list_only() -> None:
    with pytest.raises(InputError, match=r"Unknown card '~~~'\.\n"):
        card_bytes("~~~")


def test_defaults_are_what_is_free() -> None:
    here = make_budget(make_recipe({}), "cuda", 20 * GIB, 40 * GIB, "rtx4090")
    assert here == MemoryBudget(20 * GIB, 32 * GIB, CUDA_OVERHEAD_BYTES, "cuda", "rtx4090")


def test_on_a_cpu_the_tensors_count_and_nothing_else() -> None:
    free = make_budget(make_recipe({}), "cpu", 0, 10 * GIB, cores=2)
    assert free == MemoryBudget(8 * GIB, 8 * GIB, 0, "cpu", rates=cpu_rates(2))
    fixed = make_recipe({"gpu_mem": "2G", "host_mem": "3G"})
    assert make_budget(fixed, "cpu", 0, 10 * GIB) == MemoryBudget(2 * GIB, 3 * GIB, 0, "cpu", rates=cpu_rates(1))


def test_a_budget_above_the_card_is_clipped_with_a_notice() -> None:
    budget = make_budget(make_recipe({"gpu_mem": "30G"}), "cuda", 20 * GIB, 40 * GIB)
    assert budget.gpu_bytes == 20 * GIB
    assert budget.notices == ("The budget 30.0 GiB is clipped: the card has 20.0 GiB.",)
    assert not make_budget(make_recipe({"gpu_mem": "20G"}), "cuda", 20 * GIB, 40 * GIB).notices


def test_a_named_card_stands_for_the_one_here() -> None:
    budget = make_budget(make_recipe({"gpu": "RTX 3060"}), "cpu", 0, 40 * GIB)
    assert (budget.device, budget.card, budget.gpu_bytes) == ("cuda", "RTX 3060", card_bytes("rtx3060"))
    small = make_budget(make_recipe({"gpu": "rtx3060", "gpu_mem": "8G"}), "cpu", 0, 40 * GIB)
    assert (small.gpu_bytes, small.notices) == (8 * GIB, ())
    large = make_budget(make_recipe({"gpu": "rtx3060", "gpu_mem": "20G"}), "cpu", 0, 40 * GIB)
    assert large.gpu_bytes == card_bytes("rtx3060") and "rtx3060 has 11.6 GiB" in large.notices[0]
    with pytest.raises(InputError, match="Unknown card"):
        make_budget(make_recipe({"gpu": "voodoo2"}), "cpu", 0, 40 * GIB)
