"""A plan on a terminal of 80 columns, and where nothing can show colours."""

import re

import pytest


@pytest.mark.parametrize(
    "memory",
    [("--gpu", "rtx4090", "--host-mem", "64G"), ("--gpu-mem", "20G", "--host-mem", "30G"), ("--gpu-mem", "5G")],
)
def test_a_plan_fits_eighty_columns_and_loses_no_word(effitrain, monkeypatch, memory):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    from effitrain.planning import plan, recipe

    fields = {name.lstrip("-").replace("-", "_"): value for name, value in zip(memory[::2], memory[1::2], strict=True)}
    shown = effitrain("plan", "--model", "llama-70b", *memory).out
    assert "\x1b" not in shown and max(map(len, shown.splitlines())) <= 80
    running = re.sub(r"\s+", " ", shown)
    for reason in plan(recipe(model="llama-70b", **fields)).reasons:
        assert f"- {reason.partition('this machine')[0]}" in running  # what is free here changes
    assert "offload, optimizer" in running
