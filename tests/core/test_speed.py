"""The estimate of speed: by hand for a 70B, and what it must obey."""

import pytest
from shapes import preset

from effitrain.core.blobs import blob_bytes
from effitrain.core.cards import CARDS, Rates, cpu_rates, find_card, rates_of
from effitrain.core.ledger import Settings
from effitrain.core.recipe import make_recipe
from effitrain.core.speed import step_time, tokens_per_second, tokens_to_hide

RTX4090 = CARDS["rtx4090"].rates
RECIPE = make_recipe({})


def settings(tokens: int = 4096, recompute: str = "layer", streamed: int = 0, on_disk: int = 0) -> Settings:
    return Settings(tokens, 1, 4, "bf16", recompute, False, "adamw", 2e-4, streamed, on_disk)  # type: ignore[arg-type]


def test_a_resident_70b_on_a_4090_is_within_a_tenth_of_the_published_count() -> None:
    # 6 FLOP a weight and token at 99 TFLOP/s give 237 tokens/s; ours skips down_proj's value when it computes again.
    assert tokens_per_second(preset("llama-70b"), RECIPE, settings(), RTX4090) == pytest.approx(237, rel=0.1)


def test_the_tokens_that_hide_a_70b_behind_the_forward_pass() -> None:
    # 1021 tokens at 59 % of the peak, without dequantisation, attention and head, which hide copies as well.
    found = tokens_to_hide(preset("llama-70b"), RECIPE, settings(1024, streamed=80), RTX4090)
    assert 700 < found < 1021


def test_a_pass_takes_the_longer_of_computing_and_copying() -> None:
    spec, slow = preset("llama-70b"), Rates(165e12, 1e12, 1e9)
    time = step_time(spec, RECIPE, settings(512, streamed=40), slow)
    blob = blob_bytes(spec.layers[0], RECIPE, settings())
    assert time.copy == pytest.approx(40 * blob / 1e9) and time.total == pytest.approx(2 * time.copy)
    assert time.hidden_share == pytest.approx((time.forward + time.backward) / (2 * time.copy))
    fast = step_time(spec, RECIPE, settings(512, streamed=40), Rates(165e12, 1e12, 1e15))
    assert fast.total == pytest.approx(fast.forward + fast.backward) and fast.hidden_share == pytest.approx(1)
    disk = step_time(spec, RECIPE, settings(512, streamed=40, on_disk=10), Rates(165e12, 1e12, 1e15, 1e9))
    assert disk.copy == pytest.approx(10 * blob / 1e9)


def test_more_recomputation_is_slower_and_streaming_never_faster() -> None:
    spec = preset("llama-3.1-8b")
    speeds = [tokens_per_second(spec, RECIPE, settings(recompute=level), RTX4090) for level in ("none", "mlp", "layer")]
    assert speeds == sorted(speeds, reverse=True) and speeds[0] < 1.5 * speeds[2]
    assert tokens_per_second(spec, RECIPE, settings(streamed=32), RTX4090) <= speeds[2]


@pytest.mark.parametrize(
    ("driver", "card"),
    [
        ("NVIDIA GeForce RTX 4090", "rtx4090"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"), ("NVIDIA A10", "a10"), ("NVIDIA A100-SXM4-80GB", "a100-40"), ("Tesla T4", "t4"),
        ("NVIDIA GeForce RTX 4060 Ti", "rtx4060"),
    ],
)  # fmt: skip
def test_a_card_is_known_by_what_its_driver_calls_it(driver: str, card: str) -> None:
    assert rates_of(driver) == CARDS[card].rates


def test_an_unknown_driver_name_has_no_rates() -> None:
    assert rates_of("Voodoo 2") is None and rates_of(None) is None and rates_of("NVIDIA A1000") is None


def test_every_card_has_the_rates_of_its_kind() -> None:
    for name, card in CARDS.items():
        assert find_card(name) is card and 1e13 < card.rates.flops < 1e15 and 2e11 < card.rates.memory < 5e12
        assert 12e9 <= card.rates.link <= 50e9 and card.half == ("fp16" if name == "t4" else "bf16")
    assert cpu_rates(2).flops == 2 * cpu_rates(1).flops
