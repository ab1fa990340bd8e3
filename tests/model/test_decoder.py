"""Our models against stock transformers: the same logits bit for bit, isolated segments, the same with a cache."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from effitrain.model.load import fill, find_base, load_model
from effitrain.planning import recipe
from effitrain.stream.offload import Offload

CPU = torch.device("cpu")


def _load(folder, **fields):
    asked = recipe(model=str(folder), quant="none", dtype="fp32", **fields)
    return load_model(find_base(str(folder)), asked, CPU).eval()


def _flat(lengths, vocab=200):
    ids = torch.randint(3, vocab, (sum(lengths),))
    return ids, torch.cat([torch.arange(n) for n in lengths])


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_logits_of_stock_transformers_bit_for_bit(tiny_model, family, tied):
    folder = tiny_model(family, tied)
    ours, stock = _load(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    for length in (2, 7, 64, 131):  # a single row is a matrix-vector product, whose rounding depends on alignment
        ids, positions = _flat([length])
        assert torch.equal(ours.logits(ours(ids, positions, [length])), stock(ids[None]).logits[0])
    batch = torch.randint(3, 200, (3, 33))
    flat = ours.logits(ours(batch.flatten(), torch.arange(33).repeat(3), [33] * 3))
    assert torch.equal(flat.view(3, 33, -1), stock(batch).logits)


@torch.no_grad()
def test_real_models_and_tied_files_with_only_a_head(data_dir):
    for name in ("stories260K", "tinystories656K", "babyllama105"):
        folder = data_dir / "models" / name
        ours, stock = _load(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ids, positions = _flat([100], 100)
        assert torch.equal(ours.logits(ours(ids, positions, [100])), stock(ids[None]).logits[0]), name


@pytest.mark.parametrize("lengths", [[5, 5, 5], [4, 9, 1, 30], [12]])
@torch.no_grad()
def test_perturbing_one_segment_leaves_the_others_bit_identical(tiny_model, lengths):
    ours = _load(tiny_model("llama"))
    ids, positions = _flat(lengths)
    before = ours.logits(ours(ids, positions, lengths)).split(lengths)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    for k in range(len(lengths)):
        changed = ids.clone()
        changed[starts[k] : starts[k + 1]] = torch.randint(3, 200, (lengths[k],))
        after = ours.logits(ours(changed, positions, lengths)).split(lengths)
        assert all(torch.equal(a, b) == (i != k) for i, (a, b) in enumerate(zip(before, after, strict=True)))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
@torch.no_grad()
def test_segments_equal_samples_on_their_own(tiny_model, family):
    ours = _load(tiny_model(family))
    lengths = [6, 19, 3, 40]
    ids, positions = _flat(lengths)
    packed = ours(ids, positions, lengths).split(lengths)
    for segment, hidden in zip(ids.split(lengths), packed, strict=True):
        alone = ours(segment, torch.arange(len(segment)), [len(segment)])
        torch.testing.assert_close(hidden, alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_sliding_window_of_mistral(tmp_path):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=200, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8, max_position_embeddings=128,
    )  # fmt: skip
    stock = MistralForCausalLM(config).eval()
    stock.save_pretrained(tmp_path)
    ours = _load(tmp_path)
    ids, positions = _flat([50], 199)
    torch.testing.assert_close(
        ours.logits(ours(ids, positions, [50])), stock(ids[None]).logits[0], rtol=1e-5, atol=1e-5
    )
    lengths = [20, 30]
    positions = torch.cat([torch.arange(n) for n in lengths])
    for part, hidden in zip(ids.split(lengths), ours(ids, positions, lengths).split(lengths), strict=True):
        torch.testing.assert_close(ours.logits(hidden), stock(part[None]).logits[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_cache_gives_the_same_hidden_states(tiny_model):
    from transformers import DynamicCache

    ours = _load(tiny_model("qwen3"))
    ids, positions = _flat([24])
    whole = ours(ids, positions, [24])
    cache = DynamicCache(config=ours.config)
    parts = [
        ours(ids[None, a:b], positions[None, a:b], cache=cache)[0] for a, b in ((0, 10), (10, 17), (17, 18), (18, 24))
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)


def test_recomputed_layers_give_the_same_gradients(tiny_model):
    ours = _load(tiny_model("llama"))
    ids, positions = _flat([9, 14])
    for parameter in (norm := ours.layers[0].input_layernorm, ours.layers[1].post_attention_layernorm):
        parameter.requires_grad_(True)
    losses, grads = [], []
    offload = Offload(len(ours.layers), len(ids), ours.spec.hidden, torch.float32, CPU)
    for what, ours.offload in (("none", None), ("mlp", None), ("layer", None), ("layer", offload)):
        ours.set_recompute(what)
        loss = ours(ids, positions, [9, 14]).square().sum()
        losses.append(loss)
        grads.append(torch.autograd.grad(loss, [p for p in ours.parameters() if p.requires_grad]))
    assert norm.weight.requires_grad and all(torch.equal(loss, losses[0]) for loss in losses)
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


def test_a_wrong_shape_and_nan_are_refused(tiny_model):
    base = find_base(str(tiny_model("llama")))
    from effitrain.core.errors import InputError
    from effitrain.model.decoder import build

    class Bad:
        def __init__(self, change):
            self.change = change

        def __getattr__(self, name):
            return getattr(base.weights(), name)

        def read(self, name, device):
            tensor = base.weights().read(name)
            return self.change(tensor) if name == "model.layers.1.mlp.up_proj.weight" else tensor

    for change, word in ((lambda t: t[1:], "shape"), (lambda t: t.fill_(float("nan")), "NaN")):
        with pytest.raises(InputError, match=word):
            fill(build(base.spec, base.source.config, "x"), Bad(change), "none", torch.float32, CPU)
