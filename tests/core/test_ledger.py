import pytest

from effitrain.core.ledger import LedgerLine, Settings, gpu_bytes, host_bytes


def test_sides_are_summed_apart() -> None:
    lines = [LedgerLine(where, where, size, "") for where, size in (("gpu", 1), ("host", 2), ("gpu", 4), ("disk", 8))]
    assert (gpu_bytes(lines), host_bytes(lines)) == (5, 2)
    assert gpu_bytes([]) == 0


@pytest.mark.parametrize(("dtype", "width"), [("bf16", 2), ("fp16", 2), ("fp32", 4)])
def test_a_micro_batch_has_its_samples_full(dtype: str, width: int) -> None:
    settings = Settings(512, 4, 2, dtype, "none", False, "adamw", 1e-4)  # type: ignore[arg-type]
    assert (settings.tokens, settings.width) == (2048, width)
