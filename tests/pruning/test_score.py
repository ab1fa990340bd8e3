"""Streamed scores against plain references on whole models, planted importance, and bad values."""

import pytest
import torch
from torch.nn import functional as F

from effitrain.core.errors import InputError
from effitrain.core.spec import Axis
from effitrain.pruning import score
from effitrain.pruning.score import looked_at, needs, score_layers

PARTS = [Axis.FFN, Axis.KV_HEADS]
NAMES = ["random", "magnitude", "wanda", "flap", "taylor"]


def groups_of(layer, spec, values):
    """Sums per FFN channel and per KV head of element-wise importances by leaf, spelled out with loops."""
    ffn = torch.zeros(spec.ffn)
    for leaf, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        if leaf in values:
            for channel in range(spec.ffn):
                ffn[channel] += values[leaf].select(dim, channel).sum()
    kv, d, g = torch.zeros(spec.num_kv_heads), spec.head_dim, spec.num_heads // spec.num_kv_heads
    for leaf, dim, heads in (("k_proj", 0, 1), ("v_proj", 0, 1), ("q_proj", 0, g), ("o_proj", 1, g)):
        if leaf in values:
            for j in range(spec.num_kv_heads):
                kv[j] += values[leaf].narrow(dim, j * heads * d, heads * d).sum()
    return {Axis.FFN: ffn, Axis.KV_HEADS: kv}


def linears(layer):
    return {name.rpartition(".")[2]: m for name, m in layer.named_modules() if name.endswith("_proj")}


@pytest.mark.parametrize("shape", [("llama", 6, 2, 48), ("qwen3", 8, 4, 64)])
@pytest.mark.parametrize("name", ["magnitude", "wanda", "flap"])
def test_forward_scores_equal_a_plain_reference(model, text, inputs_of, name, shape):
    family, heads, kv_heads, hidden = shape
    full = model(family, heads=heads, kv_heads=kv_heads, hidden=hidden)
    batches = text(3)
    scores = score_layers(name, full.walk(), [0, 1], PARTS, 0, batches)
    stock = full.stock()
    inputs = inputs_of(stock, batches)
    for index, layer in enumerate(stock.model.layers):
        values = {}
        for leaf, linear in linears(layer).items():
            x = next(v for key, v in inputs.items() if key.endswith(f"layers.{index}.{_path(leaf)}"))
            w = linear.weight.detach()
            if name == "magnitude":
                values[leaf] = w**2
            elif leaf in ("o_proj", "down_proj") and name == "wanda":
                values[leaf] = w.abs() * x.norm(dim=0)
            elif leaf in ("o_proj", "down_proj"):
                values[leaf] = w**2 * x.var(dim=0)
        expected = groups_of(layer, full.spec, values)
        if name == "flap":
            expected[Axis.KV_HEADS] = expected[Axis.KV_HEADS] ** 2
        for part in PARTS:
            torch.testing.assert_close(scores[index][part], expected[part], rtol=1e-4, atol=1e-6)


def _path(leaf):
    return f"self_attn.{leaf}" if leaf[0] in "qkvo" else f"mlp.{leaf}"


def whole_model_taylor(full, batches):
    """Autograd through the whole model at once: W is a parameter, its gradient of the loss summed over everything."""
    stock = full.stock()
    for batch in batches:
        for ids in batch.input_ids.split(list(batch.segments)):
            logits = stock(input_ids=ids[None]).logits[0, :-1]
            F.cross_entropy(logits, ids[1:], reduction="sum").backward()
    found = {}
    for index, layer in enumerate(stock.model.layers):
        values = {leaf: (m.weight * m.weight.grad).abs().detach() for leaf, m in linears(layer).items()}
        found[index] = groups_of(layer, full.spec, values)
    return found


@pytest.mark.parametrize("shape", [("llama", 6, 2, 48), ("qwen3", 8, 4, 64)])
def test_taylor_equals_autograd_through_the_whole_model(model, text, shape):
    family, heads, kv_heads, hidden = shape
    full = model(family, heads=heads, kv_heads=kv_heads, hidden=hidden)
    batches = text(3)
    scores = score_layers("taylor", full.walk(), [0, 1], PARTS, 0, batches)
    expected = whole_model_taylor(full, batches)
    for index in (0, 1):
        for part in PARTS:
            torch.testing.assert_close(scores[index][part], expected[index][part], rtol=1e-4, atol=1e-6)


def test_streamed_taylor_is_bit_for_bit_that_of_a_resident_model(model, text):
    """The same hooks on the same decoder, filled whole and differentiated in one backward pass per micro-batch."""
    from effitrain.model.load import fill
    from effitrain.pruning import score as module
    from effitrain.pruning.scores import taylor
    from effitrain.pruning.scores.seen import SeenLayer
    from effitrain.train.loss import loss_sum

    full, batches = model("llama", heads=6, kv_heads=2, hidden=48), text(3)
    scores = score_layers("taylor", full.walk(), [0, 1], PARTS, 0, batches)
    decoder = fill(full.empty(), full.weights, "none", torch.float32, torch.device("cpu"))
    walk = full.walk()
    walk.decoder = decoder
    seen = [module._seen(walk, index, layer) for index, layer in enumerate(decoder.layers)]
    handles = [module._watching(layer, seen[i], module._see_gradient) for i, layer in enumerate(decoder.layers)]
    for handle in handles:
        handle.__enter__()
    decoder.model.embed_tokens.weight.requires_grad_()  # something must ask for gradients; norms stay frozen as there
    for batch in batches:
        loss_sum(decoder, batch).backward()
    for index in (0, 1):
        layer = SeenLayer(full.spec.layers[index], 2, 0, seen[index])
        for part in PARTS:
            assert torch.equal(taylor.score(layer, part), scores[index][part])


@pytest.mark.parametrize("name", [n for n in NAMES if n != "random"])
def test_a_planted_query_head_brings_its_kv_group_to_the_top(model, text, tmp_path, name):
    """Query head 8j + 5 of 64 heads on 8 KV heads belongs to group j (and not to group 5)."""
    import shutil

    from safetensors.torch import load_file, save_file

    planted = 2
    full = model("llama", heads=64, kv_heads=8, hidden=256, layers=1)
    shutil.copytree(full.folder, tmp_path / "planted")
    file = tmp_path / "planted/model.safetensors"
    tensors = load_file(file)
    d = full.spec.head_dim
    rows = slice((8 * planted + 5) * d, (8 * planted + 6) * d)
    tensors["model.layers.0.self_attn.o_proj.weight"][:, rows] *= 100
    save_file(tensors, file)
    full.folder = tmp_path / "planted"
    scores = score_layers(name, full.walk(), [0], [Axis.KV_HEADS], 0, text(2))
    assert scores[0][Axis.KV_HEADS].argmax() == planted


def test_random_depends_on_seed_layer_and_part_alone(model):
    full = model()
    first = score_layers("random", full.walk(), [0, 1], PARTS, 5)
    again = score_layers("random", full.walk(), [1], PARTS, 5)
    other = score_layers("random", full.walk(), [1], PARTS, 6)
    assert torch.equal(first[1][Axis.FFN], again[1][Axis.FFN])
    assert not torch.equal(first[1][Axis.FFN], other[1][Axis.FFN])
    assert not torch.equal(first[0][Axis.FFN], first[1][Axis.FFN])


def test_only_the_asked_for_layers_are_scored_and_emptied(model, text):
    full = model(layers=3)
    walk, done = full.walk(), []
    scores = score_layers("taylor", walk, [1], [Axis.FFN], 0, text(1), done.append)
    assert list(scores) == done == [1] and list(scores[1]) == [Axis.FFN]
    assert all(layer.mlp.up_proj.weight is None for layer in walk.decoder.layers)
    assert walk.decoder.lm_head.weight is None and walk.decoder.model.embed_tokens.weight is None


def test_a_gradient_score_keeps_the_inputs_of_as_much_text_as_the_bound_holds(model, text, monkeypatch):
    """Two of three micro-batches of 26 tokens fit; one is looked at however little fits; other scores see all."""
    full, batches = model(), text(3)
    per_token = 2 * full.spec.hidden * 4  # layers, float32

    def taylor(some):
        return score_layers("taylor", full.walk(), [0, 1], [Axis.FFN], 0, some)[0][Axis.FFN]

    one, two, three = (taylor(batches[:count]) for count in (1, 2, 3))
    assert not torch.equal(two, three) and not torch.equal(one, two)
    for tokens, expected in ((77, two), (52, two), (51, one), (1, one), (78, three)):
        monkeypatch.setattr(score, "KEPT_INPUTS", tokens * per_token)
        assert torch.equal(taylor(batches), expected)
    monkeypatch.setattr(score, "KEPT_INPUTS", 0)
    assert list(looked_at("wanda", full.walk(), batches)) == batches


def test_a_score_that_is_not_finite_is_refused(model, text, monkeypatch):
    from effitrain.pruning.scores import magnitude

    monkeypatch.setattr(magnitude, "score", lambda layer, part: torch.tensor([1.0, torch.nan]))
    with pytest.raises(InputError, match=r"magnitude scores of layer 0 .* 1 values"):
        score_layers("magnitude", model().walk(), [0], [Axis.FFN], 0)


def test_what_each_score_needs():
    assert {name: needs(name) for name in NAMES} == {
        "random": "nothing", "magnitude": "weights", "wanda": "inputs", "flap": "inputs", "taylor": "gradients",
    }  # fmt: skip
