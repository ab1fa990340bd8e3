"""Sizes of pruned models from configuration alone, against published figures."""

import json
import random

import pytest
from shapes import preset

from effitrain.core.budget import MemoryBudget
from effitrain.core.cut import cut_spec, cut_widths, default_exempt, default_multiple, removed_share, small_spec
from effitrain.core.errors import InputError
from effitrain.core.plan import for_tokens, make_plan, resolve
from effitrain.core.recipe import make_recipe
from effitrain.core.spec import Widths, pruned_config, spec_from_config
from effitrain.core.ways import ways

CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 261, "max_position_embeddings": 512,
    "head_dim": 8,
}  # fmt: skip


def small(**sizes):
    return spec_from_config({**CONFIG, **sizes}, "mine")


@pytest.mark.parametrize(
    ("name", "ratio", "params"),
    [  # LoRAM, tables of parameter reduction: five rows at 70B and the one at 13B; the other two follow from them
        ("llama-2-70b", 0.65, 28_099_436_544),
        ("llama-2-70b", 0.75, 21_488_738_304),
        ("llama-2-70b", 0.85, 16_272_924_672),
        ("llama-2-70b", 0.95, 9_662_226_432),
        ("llama-3.1-70b", 0.85, 17_849_982_976),
        ("llama-2-13b", 0.65, 6_005_662_720),
    ],
)
def test_published_parameter_counts_to_the_digit(name, ratio, params):
    assert cut_spec(preset(name), ratio, "ffn+kv", (4, 2), multiple=1).params == params


def test_widths_are_rounded_to_the_multiple():
    kept = [cut_widths(preset("llama-2-70b"), ratio)[40] for ratio in (0.65, 0.75, 0.85, 0.95)]
    assert kept == [Widths(9984, 3), Widths(7168, 2), Widths(4352, 2), Widths(1536, 1)]


def test_exempt_layers_and_parts():
    widths = cut_widths(small(), 0.5, "ffn", (2, 1))
    assert widths == (Widths(112, 2),) * 2 + (Widths(56, 2),) * 3 + (Widths(112, 2),)
    assert cut_widths(small(), 0.5, "kv", (0, 0)) == (Widths(112, 1),) * 6
    assert cut_widths(small(), 0.5)[1:5] == (Widths(56, 1),) * 4


def test_defaults_in_proportion():
    assert [default_exempt(layers) for layers in (80, 40, 32, 6, 126)] == [(4, 2), (2, 1), (2, 1), (1, 1), (6, 3)]
    assert [default_multiple(ffn) for ffn in (28672, 11008, 2048, 512, 112, 3)] == [256, 256, 256, 64, 8, 1]


def test_ratio_zero_changes_nothing_even_where_sizes_are_no_multiple():
    assert cut_spec(small(intermediate_size=113), 0.0, exempt=(6, 6)) == small(intermediate_size=113)


def test_something_always_stays():
    assert cut_widths(small(), 0.999, exempt=(0, 0))[0] == Widths(8, 1)
    assert cut_widths(small(num_key_value_heads=8), 0.999, exempt=(0, 0), multiple=1)[0] == Widths(1, 1)


def test_ratios_are_exact_decimals():
    assert cut_widths(small(intermediate_size=100), 0.07, exempt=(0, 0), multiple=1)[0].ffn == 93


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.2, float("nan")])
def test_ratios_out_of_range(ratio):
    with pytest.raises(InputError, match="from 0 to below 1"):
        cut_spec(small(), ratio)


def test_all_layers_exempt():
    with pytest.raises(InputError, match="none of the 6 layers"):
        cut_spec(small(), 0.5, exempt=(4, 2))


GLOBAL = {"fit": "prune", "prune_ratio": 0.5, "prune_ranking": "global"}


def test_where_layers_compete_the_shape_is_the_most_uneven_one():
    spec = small(num_hidden_layers=6, num_key_value_heads=8)
    widths = small_spec(spec, make_recipe(GLOBAL)).widths
    assert widths == (Widths(112, 8), Widths(112, 8), Widths(96, 6), Widths(8, 1), Widths(8, 1), Widths(112, 8))
    local = small_spec(spec, make_recipe({**GLOBAL, "prune_ranking": "local"})).widths
    for part in ("ffn", "kv_heads"):
        assert sum(getattr(w, part) for w in widths) == sum(getattr(w, part) for w in local)


@pytest.mark.parametrize("fixed", [{}, {"prune_exempt": "0,0"}, {"align": "bias"}], ids=str)
@pytest.mark.parametrize("recompute", ["none", "layer"])
def test_no_outcome_of_ranking_takes_more_than_was_planned(fixed, recompute):
    """Random shares of the same sums, planned anew with their exact widths, as a run does after cutting."""
    spec, budget = preset("llama-3.2-1b"), MemoryBudget(2**36, 2**36, 0, "cpu")
    recipe = make_recipe({**GLOBAL, **fixed, "recompute": recompute, "max_seq_len": 512, "batch_size": 2})
    promised = make_plan(spec, recipe, budget)
    local = cut_widths(spec, 0.5, exempt=recipe.prune_exempt)
    pruned = [i for i, (w, full) in enumerate(zip(local, spec.widths, strict=True)) if w != full]
    for seed in range(5):
        rng, widths = random.Random(seed), list(local)
        for _ in range(200):
            a, b = rng.sample(pruned, 2)
            runs = rng.choice((256, 0))
            heads = 1 - runs // 256
            more = Widths(widths[a].ffn + runs, widths[a].kv_heads + heads)
            less = Widths(widths[b].ffn - runs, widths[b].kv_heads - heads)
            if more.ffn <= spec.ffn and more.kv_heads <= 8 and less.ffn >= 256 and less.kv_heads >= 1:
                widths[a], widths[b] = more, less
        assert len(set(widths)) > 3
        exact = spec.resized(widths).with_biases(
            [f"model.layers.{i}.mlp.down_proj" for i in pruned] if recipe.align == "bias" else []
        )
        after = for_tokens(promised, exact, resolve(recipe, promised), budget, 1024, 1024)
        assert after.peak_bytes <= promised.peak_bytes and after.host_peak_bytes <= promised.host_peak_bytes


def test_biases_that_the_family_lacks_are_counted_and_written_down():
    spec = small()
    recipe = make_recipe({"fit": "prune", "prune_ratio": 0.5, "align": "bias"})
    cut = small_spec(spec, recipe)
    assert cut.params - cut_spec(spec, 0.5).params == 4 * 2 * 64  # o and down of four layers
    written = pruned_config(CONFIG, cut)
    assert spec_from_config(written, "mine").layers == cut.layers
    for bad in ("all", ["model.layers.9.mlp.down_proj"], {"a": 1}):
        with pytest.raises(InputError, match="effitrain_biases"):
            spec_from_config({**written, "effitrain_biases": bad}, "mine")
    own = spec_from_config({**CONFIG, "attention_bias": True}, "mine")  # o has one, down gets one
    named = pruned_config({**CONFIG, "attention_bias": True}, small_spec(own, recipe))["effitrain_biases"]
    assert {path.rpartition(".")[2] for path in named} == {"down_proj"}


@pytest.fixture
def made_before(tmp_path):
    """``write(**config)``: a folder with the config.json of a small model of ``small()``, uneven and with a bias."""

    def write(**config):
        whole = small()
        widths = [Widths(112, 2), Widths(24, 1), Widths(16, 2), *3 * [Widths(112, 2)]]
        cut = whole.resized(widths).with_biases(["model.layers.1.mlp.down_proj"])
        (tmp_path / "config.json").write_text(json.dumps({**pruned_config(CONFIG, cut), **config}))
        return make_recipe({"fit": "prune", "small_model": str(tmp_path)})

    return write


def test_a_small_model_that_is_there_has_its_own_widths_and_ratio(made_before):
    whole, recipe = small(), made_before()
    cut = small_spec(whole, recipe)
    assert [(w.ffn, w.kv_heads) for w in cut.widths] == [(112, 2), (24, 1), (16, 2), *3 * [(112, 2)]]
    assert cut.linears["model.layers.1.mlp.down_proj"].bias and not cut.linears["model.layers.2.mlp.down_proj"].bias
    gone = 1 - sum(cut.layers[i].weights for i in (1, 2)) / sum(whole.layers[i].weights for i in (1, 2))
    assert removed_share(whole, cut) == round(gone, 3) and removed_share(whole, whole) == 0


@pytest.mark.parametrize(
    "config, words",
    [
        ({"num_hidden_layers": 3, "effitrain_widths": {"ffn": [64] * 3, "kv_heads": [2] * 3}}, "not cut from"),
        ({"hidden_size": 128}, "not cut from"),
        ({"intermediate_size": 128, "effitrain_widths": {"ffn": [128] * 6, "kv_heads": [2] * 6}}, "not cut from"),
        ({"effitrain_widths": {"ffn": [64]}}, "do not go with"),
    ],
)
def test_a_small_model_of_another_model_is_refused(made_before, config, words):
    config = {"effitrain_biases": [], **config}
    with pytest.raises(InputError, match=words):
        small_spec(small(), made_before(**config))


def test_a_small_model_of_two_layers_without_exempt_ones_keeps_the_ratio_it_was_given(made_before):
    """The recipe of a run is written down with its ratio, and read again when the run goes on."""
    whole, budget = small(num_hidden_layers=2), MemoryBudget(2**36, 2**36, 0, "cpu")
    widths = {"ffn": [56, 48], "kv_heads": [2, 1]}
    recipe = made_before(num_hidden_layers=2, effitrain_biases=[], effitrain_widths=widths)
    (way, *_) = ways(whole, recipe, budget)
    (again, *_) = ways(whole, recipe.changed(prune_ratio=way.prune_ratio), budget)
    assert 0.4 < way.prune_ratio == again.prune_ratio < 0.6 and again.spec == way.spec


@pytest.mark.parametrize("content", [None, "[]", "null", "{"])
def test_a_folder_without_a_model_is_no_small_model(content, tmp_path):
    if content:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"no config\.json of a pruned model"):
        small_spec(small(), make_recipe({"fit": "prune", "small_model": str(tmp_path)}))
