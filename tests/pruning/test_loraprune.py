"""LoRAPrune: its estimate of the gradient, its schedule, its masks, and the small model that they leave."""

import dataclasses
from itertools import pairwise

import pytest
import torch

from effitrain.adapters.attach import attach
from effitrain.adapters.base import AdapterConfig, Clock
from effitrain.core.cut import cut_widths
from effitrain.core.errors import InputError
from effitrain.core.spec import Axis, Widths
from effitrain.model.load import fill, find_base
from effitrain.pruning import loraprune
from effitrain.pruning.loraprune import LoRAPrune, column_importance, removed_share
from effitrain.train.loss import loss_sum

from .conftest import CPU

CONFIG = AdapterConfig(r=3, alpha=6)


def adapted(model, config=CONFIG, std=0.1):
    decoder = fill(model.empty(), model.weights, "none", torch.float32, CPU)
    adapters = attach(decoder, config, Clock(1))
    with torch.no_grad():
        for adapter in adapters.values():
            adapter.B.normal_(std=std)
    return decoder, adapters


def logits(decoder, batch):
    with torch.no_grad():
        return decoder.logits(decoder(batch.input_ids, batch.position_ids, batch.segments))


def watch(module, seen):
    """Put the input and the gradient of the output of the next call into ``seen``."""

    def hook(module, inputs, output):
        seen["x"] = inputs[0].detach()
        output.register_hook(lambda grad: seen.update(g=grad))

    module.register_forward_hook(hook)


@pytest.fixture
def full(model):
    return model("llama", heads=8, kv_heads=4, layers=3)


def gradients(decoder, text, path):
    """Backward of a batch; the explicit gradient of the effective weight of ``path``."""
    seen = {}
    watch(decoder.get_submodule(path), seen)
    loss_sum(decoder, text(1)[0]).backward()
    return seen["g"][0].t() @ seen["x"][0]


def test_importance_is_the_projected_gradient_times_the_effective_weight(full, text):
    """B dA = s B B^T G of the explicit gradient G of the effective weight: no column of G reaches another."""
    decoder, adapters = adapted(full)
    path = "model.layers.1.mlp.down_proj"
    G = gradients(decoder, text, path)
    adapter, s, W = adapters[path], CONFIG.scaling, decoder.get_submodule(path).base.weight
    A, B = adapter.A.detach(), adapter.B.detach()
    expected = (s * (B @ B.t() @ G) * (W + s * B @ A)).abs().sum(0)
    torch.testing.assert_close(column_importance(adapter, W), expected, rtol=1e-4, atol=1e-6)


def test_a_full_rank_orthogonal_lora_sees_the_exact_gradient(full, text):
    """B B^T = 1 and A = 0: the estimate is s G, so the order is that of exact first-order Taylor."""
    hidden = full.spec.hidden
    decoder, adapters = adapted(full, AdapterConfig(r=hidden, alpha=hidden))
    path = "model.layers.1.self_attn.o_proj"
    adapter, W = adapters[path], decoder.get_submodule(path).base.weight
    with torch.no_grad():
        adapter.A.zero_()
        adapter.B.copy_(torch.linalg.qr(torch.randn(hidden, hidden))[0])
    exact = (gradients(decoder, text, path) * W).abs().sum(0)
    torch.testing.assert_close(column_importance(adapter, W), exact, rtol=1e-3, atol=1e-6)


def test_a_group_counts_by_the_columns_that_read_it(full, text):
    """After one step: scores of down_proj's columns, of o_proj's summed over the query heads of a group."""
    decoder, adapters = adapted(full)
    pruner = LoRAPrune(decoder, adapters, cut_widths(full.spec, 0.5), 10)
    loss_sum(decoder, text(1)[0]).backward()
    pruner.after_backward()
    for part, path, width in ((Axis.FFN, "mlp.down_proj", 1), (Axis.KV_HEADS, "self_attn.o_proj", 2)):
        path = f"model.layers.1.{path}"
        columns = column_importance(adapters[path], decoder.get_submodule(path).base.weight)
        groups = columns.view(-1, width * (full.spec.head_dim if width > 1 else 1)).sum(1)
        torch.testing.assert_close(pruner.scores[1, part], 0.1 * groups / groups.norm())


def test_parts_that_no_adapter_reads_are_refused(full):
    decoder, adapters = adapted(full, AdapterConfig(r=3, alpha=6, targets=("q_proj", "down_proj")))
    LoRAPrune(decoder, adapters, cut_widths(full.spec, 0.5, "ffn"), 10)
    with pytest.raises(InputError, match=r"layer 1 that reads its kv_heads has an adapter"):
        LoRAPrune(decoder, adapters, cut_widths(full.spec, 0.5), 10)


def test_the_cubic_schedule():
    begin, end = loraprune._BEGIN, loraprune._END
    shares = [removed_share(step / 1000) for step in range(1001)]
    assert shares == sorted(shares)
    assert removed_share(begin) == 0 and removed_share(end) == removed_share(1.0) == 1
    assert removed_share((begin + end) / 2) == pytest.approx(0.875)


def run(decoder, adapters, widths, batches, steps):
    """A run of ``steps`` steps of plain gradient descent."""
    pruner = LoRAPrune(decoder, adapters, widths, steps)
    parameters = [p for p in decoder.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    masked = []
    for step in range(1, steps + 1):
        loss_sum(decoder, batches[step % len(batches)]).backward()
        pruner.after_backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.after_step(step)
        masked.append({key: mask.clone() for key, mask in pruner.masks.items()})
    return pruner, masked


@pytest.mark.parametrize("steps", [7, 90])
def test_masks_grow_to_exactly_the_final_widths(full, text, steps):
    decoder, adapters = adapted(full)
    widths = cut_widths(full.spec, 0.5)
    pruner, masked = run(decoder, adapters, widths, text(3), steps)
    assert pruner.keep_map("b", "f").widths == widths
    assert widths[1] == Widths(56, 2) and widths[0] == Widths(112, 4)
    for before, after in pairwise(masked):
        assert all((after[key] <= before[key]).all() for key in before)  # what is masked stays masked
    counts = [int((mask[1, Axis.FFN] == 0).sum()) for mask in masked]
    assert steps == 7 or (len(set(counts)) > 4 and not any(counts[:2]) and counts[10] == 56)


def test_nothing_goes_before_there_are_scores(full, text):
    """B is zero in the first step, and so is all that is known."""
    _, masked = run(*adapted(full, std=0.0), cut_widths(full.spec, 0.5), text(3), 7)
    assert all(mask.all() for mask in masked[0].values()) and not masked[1][1, Axis.FFN].all()


def test_masked_rows_get_no_gradient(full, text):
    decoder, adapters = adapted(full)
    pruner, _ = run(decoder, adapters, cut_widths(full.spec, 0.5), text(3), 5)
    loss_sum(decoder, text(1)[0]).backward()
    gone = pruner.masks[1, Axis.FFN] == 0
    assert gone.any() and not adapters["model.layers.1.mlp.up_proj"].B.grad[gone].any()
    heads = pruner.masks[1, Axis.KV_HEADS].repeat_interleave(2 * full.spec.head_dim) == 0
    assert heads.any() and not adapters["model.layers.1.self_attn.q_proj"].B.grad[heads].any()


def test_the_small_model_computes_what_the_masked_one_does(full, text, tmp_path):
    """Merged weights round once more: 1e-5 of the logits' size, float32."""
    decoder, adapters = adapted(full)
    pruner, _ = run(decoder, adapters, cut_widths(full.spec, 0.5), text(3), 5)
    pruner.write(full.base.fetched(), CONFIG, tmp_path / "model")
    base = find_base(str(tmp_path / "model")).fetched()
    small = dataclasses.replace(full, folder=tmp_path / "model")
    loaded = fill(small.empty(), base.weights(), "none", torch.float32, CPU)
    (batch,) = text(1)
    expected = logits(decoder, batch)
    torch.testing.assert_close(logits(loaded, batch), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert base.spec.params < full.spec.params


def test_a_planted_query_head_keeps_its_group(full, text):
    """Query head 3 of 8 belongs to KV head 1 of 4: with o_proj's columns for it made large, that group stays."""
    decoder, adapters = adapted(full)
    d = full.spec.head_dim
    decoder.layers[1].self_attn.o_proj.base.weight[:, 3 * d : 4 * d] *= 50
    pruner, _ = run(decoder, adapters, cut_widths(full.spec, 0.7), text(3), 5)
    assert 1 in pruner.keep_map("b", "f").layers[1].kv_heads


def test_a_step_that_is_not_finite_leaves_the_scores(full, text):
    decoder, adapters = adapted(full)
    pruner = LoRAPrune(decoder, adapters, cut_widths(full.spec, 0.5), 10)
    loss_sum(decoder, text(1)[0]).backward()
    pruner.after_backward()
    before = {name: tensor.clone() for name, tensor in pruner.state().items()}
    adapters["model.layers.1.mlp.down_proj"].A.grad.fill_(torch.nan)
    pruner.after_backward()
    after = pruner.state()
    assert torch.equal(before["loraprune.score.1.ffn"], after["loraprune.score.1.ffn"])
    assert set(after) == {f"loraprune.{kind}.1.{part}" for kind in ("mask", "score") for part in ("ffn", "kv_heads")}
