"""What a plan offers besides itself: each offer is what the plan says when its flags are taken."""

import json
from pathlib import Path
from typing import Any

import pytest
from shapes import config_of, preset

from effitrain.core.budget import GIB, make_budget
from effitrain.core.cut import cut_spec
from effitrain.core.names import flag_of
from effitrain.core.plan import Plan, make_plan, refusal, resolve
from effitrain.core.recipe import make_recipe
from effitrain.core.spec import pruned_config

# Where nothing fits, and what was asked for besides a model and memory.
ASKED: dict[str, tuple[str, float, float, dict[str, Any]]] = {
    "long on a small host": ("llama-70b", 20, 14.3, {"max_seq_len": 8192}),
    "far too long": ("llama-70b", 20, 14.3, {"max_seq_len": 131_072}),
    "all fixed": ("llama-3.1-8b", 7, 64, {"batch_size": 4, "recompute": "none", "max_seq_len": 4096, "grad_accum": 2}),
    "resident alone": ("llama-3.1-8b", 10, 64, {"fit": "resident", "batch_size": 4, "optimizer": "adamw"}),
    "layers that stay": ("llama-70b", 20, 64, {"resident_layers": 60}),
    "pruned by little": ("llama-70b", 20, 64, {"prune_ratio": 0.1, "prune_score": "magnitude"}),
    "pruned while it trains": ("llama-3.1-8b", 4, 64, {"prune_method": "loraprune", "prune_ratio": 0.5}),
    "by turns": ("llama-3.1-8b", 3, 6, {"method": "lisa-lora", "max_seq_len": 4096}),
    "too many that stay": ("llama-70b", 20, 64, {"fit": "stream", "resident_layers": 60}),
    "layer order": ("qwen2.5-7b", 4, 6, {"stream_order": "layer", "max_seq_len": 4096}),
    "what some changes contradict": ("llama-3.1-8b", 3, 6, {"recompute": "none", "mlp_tiles": 1, "quant": "none"}),
    "groups of a set size": ("llama-3.1-8b", 8, 16, {"attention": "s2", "s2_group": 8192, "max_seq_len": 65_536}),
    "streams with recomputation alone": ("llama-3.1-8b", 5, 64, {"fit": "resident", "recompute": "none"}),
    "fits": ("llama-70b", 20, 64, {}),
}


def made(model: str, gpu: float, host: float, fields: dict[str, Any], named: bool = True) -> Plan:
    """A plan for a card of 24 GiB, its budgets named, or what is free there."""
    sizes = {"gpu_mem": int(gpu * GIB), "host_mem": int(host * GIB)} if named else {}
    recipe = make_recipe({**fields, **sizes})
    free = 24 * GIB if named else int(gpu * GIB)
    return make_plan(preset(model), recipe, make_budget(recipe, "cuda", free, int(host * GIB) * 10 // 8, "RTX 4090"))


def taken(fields: dict[str, Any], words: str) -> dict[str, Any]:
    """``fields`` with the flags of an offer, and without those that it leaves out."""
    flags, _, without = words.partition(" without ")
    pairs = flags.split()
    left = {name: value for name, value in fields.items() if flag_of(name) not in without.split()}
    return {**left, **{flag[2:].replace("-", "_"): value for flag, value in zip(pairs[::2], pairs[1::2], strict=True)}}


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_offers_are_true_when_taken(asked: tuple[str, float, float, dict[str, Any]]) -> None:
    _check_offers(*asked)


def test_offers_beside_a_small_model_leave_it_out(tmp_path: Path) -> None:
    spec, config = preset("llama-3.1-8b"), config_of("llama-3.1-8b")
    (tmp_path / "config.json").write_text(json.dumps(pruned_config(config, cut_spec(spec, 0.5))))
    _check_offers("llama-3.1-8b", 3, 64, {"fit": "prune", "small_model": str(tmp_path)})


def _check_offers(model: str, gpu: float, host: float, fields: dict[str, Any]) -> None:
    asked = model, gpu, host, fields
    rows = [row for row in made(*asked).alternatives if row.why.startswith("--")]
    assert any(row.fits for row in rows)
    for row in rows:
        flags = taken(fields, row.why)
        plan = made(model, gpu, host, flags)
        if plan.fits:
            resolve(make_recipe(flags), plan)
        found = (plan.fits, plan.fit, plan.prune_ratio, plan.peak_bytes, plan.host_peak_bytes)
        assert found == (row.fits, row.fit, row.prune_ratio, row.peak_bytes, row.host_peak_bytes), row.why


@pytest.mark.parametrize("named", [True, False])
def test_a_shorter_sequence_is_the_longest_that_fits(named: bool) -> None:
    """To the step where memory is named; else it also fits when 2 % less is free by the time it is tried."""
    fields: dict[str, Any] = {"max_seq_len": 32_768, "fit": "resident"}

    def fits(length: int, gpu: float = 7, host: float = 16) -> bool:
        return made("llama-3.1-8b", gpu, host, {**fields, "max_seq_len": length}, named).fits

    (row,) = (row for row in made("llama-3.1-8b", 7, 16, fields, named).alternatives if "--max-seq-len" in row.why)
    length = int(row.why.split()[-1])
    assert row.fits and length % 64 == 0
    assert fits(length) and fits(length, 7 * 0.985, 16 * 0.985) is not named
    assert fits(length + 64) is not named


def test_a_refusal_names_what_each_way_takes() -> None:
    short = made(*ASKED["long on a small host"])
    advice = refusal(short).next_step
    assert short.settings.streamed == 0 and "The model needs 21.0 GiB" in short.reasons[0]
    assert "Try --max-seq-len 7488 (pruned by 0.95, 20.0 GiB, 5.9 GiB of host memory), or --fit stream --" in advice
    assert refusal(made(*ASKED["resident alone"])).next_step.count("--fit prune") == 1


def test_the_first_changes_that_suffice_are_joined() -> None:
    fields = {
        "batch_size": 4, "grad_accum": 2, "recompute": "none", "max_seq_len": 4096, "fit": "resident",
        "optimizer": "adamw",
    }  # fmt: skip
    rows = {gpu: made("llama-3.1-8b", gpu, 64, fields).alternatives for gpu in (7.3, 20)}
    assert "--recompute layer --batch-size 1 --grad-accum 8" in [row.why for row in rows[7.3] if row.fits]
    assert "--recompute layer" in [row.why for row in rows[20] if row.fits]
