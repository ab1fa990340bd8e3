"""LISA: exactly the sampled layers change, states neither grow nor leak, and every home keeps what was trained."""

import hashlib

import numpy as np
import pytest
import torch

from effitrain.adapters.base import Clock
from effitrain.core.budget import MemoryBudget
from effitrain.core.errors import InputError
from effitrain.core.placement import place
from effitrain.core.plan import make_plan, resolve
from effitrain.data.tokenized import TokenSet
from effitrain.model.load import find_base
from effitrain.model.trained import TrainedLinear, layer_weights
from effitrain.planning import recipe
from effitrain.train.adapter_homes import low_rank
from effitrain.train.hooks import Hook
from effitrain.train.job import assemble, make_batches
from effitrain.train.lisa import extremes
from effitrain.train.loop import train
from effitrain.train.memory import Meter
from effitrain.train.probe import probe
from effitrain.train.state import TrainState

CPU = torch.device("cpu")
LAYERS = 6


def tokens(count=64, length=24, vocab=200) -> TokenSet:
    ids = np.random.default_rng(0).integers(3, vocab, count * length).astype(np.int32)
    return TokenSet(ids, ids.copy(), np.arange(0, count * length + 1, length))


def job(tiny_model, streamed=False, family="llama", steps=12, **fields):
    """A job on a model of six layers, begun; its plan."""
    base = find_base(str(tiny_model(family, layers=LAYERS)))
    given = {
        "method": "lisa", "quant": "none", "dtype": "fp32", "lisa_interval": 2, "batch_size": 2, "grad_accum": 1,
        "max_seq_len": 24, "lr": 1e-2, "max_steps": steps, "optimizer": "adamw", "model": str(base.folder),
        "lisa_train_embeddings": False if fields.get("method", "lisa") == "lisa" else None,
        "fit": "stream" if streamed else "resident", "schedule": "constant", "warmup": 0.0, **fields,
    }  # fmt: skip
    asked = recipe(**given)
    plan = make_plan(base.spec, asked, MemoryBudget(2**40, 2**40, 0, "cpu"))
    placement = place(LAYERS, 2, 3) if streamed else None
    full = resolve(asked, plan)
    made = assemble(full, base, make_batches(tokens(), full), CPU, placement=placement)
    if made.lisa:
        made.lisa.begin(0)
    return made, plan


class Watch(Hook):
    """Losses, and ``look()`` after every step."""

    def __init__(self, look=lambda: None):
        self.look, self.losses, self.seen = look, [], []
        self.state = TrainState()

    def after_step(self, state, record):
        self.losses.append(record.loss)
        self.seen.append(self.look())


def run(made, look=lambda: None) -> Watch:
    watch = Watch(look)
    hooks = [made.lisa, watch] if made.lisa else [watch]
    train(made.decoder, made.batches, made.optimizer, made.course, watch.state, made.clock, hooks)
    return watch


def weights_of(decoder, layer) -> dict[str, torch.Tensor]:
    """What a layer computes with, masters or frozen weights, by path."""
    module = decoder.layers[layer]
    masters = {path: p.detach() for path, p in module.named_parameters()}
    return {**layer_weights(module), **masters}


def digest(tensors: dict[str, torch.Tensor]) -> str:
    data = b"".join(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for _, t in sorted(tensors.items()))
    return hashlib.sha256(data).hexdigest()


def digests(decoder) -> dict[str, str]:
    found = {f"layer {i}": digest(weights_of(decoder, i)) for i in range(LAYERS)}
    table, head, norm = decoder.model.embed_tokens.weight, decoder.lm_head.weight, decoder.model.norm.weight
    return found | {name: digest({"": t.detach()}) for name, t in (("E", table), ("H", head), ("N", norm))}


@pytest.mark.parametrize("tables", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_between_switches_exactly_the_sampled_layers_change(tiny_model, family, tables):
    made, _ = job(tiny_model, family=family, lisa_train_embeddings=tables, steps=20)
    before = digests(made.decoder)
    steps = run(made, lambda: digests(made.decoder)).seen
    for number, after in enumerate(steps):
        active = made.lisa.sampler.sample(number // 2)
        expected = {f"layer {i}" for i in active} | ({"E", "H", "N"} if tables else set())
        assert {name for name in after if after[name] != before[name]} == expected
        before = after
    assert len({made.lisa.sampler.sample(i) for i in range(10)}) > 3


@pytest.mark.parametrize("recompute", ["none", "layer"])
def test_all_layers_at_a_time_are_full_tuning(tiny_model, recompute):
    lisa, _ = job(tiny_model, lisa_layers=LAYERS, lisa_train_embeddings=True, recompute=recompute)
    full, _ = job(tiny_model, method="full", lisa_interval=10, recompute=recompute)
    losses = run(full).losses
    assert len({*losses}) == 12
    assert run(lisa).losses == pytest.approx(losses, rel=1e-6)  # the gradient's norm is summed in another order


def test_a_layer_first_trained_in_round_five_moves(tiny_model):
    made, _ = job(tiny_model, lisa_layers=1, steps=20, seed=7)
    first_round = {}
    for number in range(10):
        first_round.setdefault(made.lisa.sampler.sample(number)[0], number)
    late = max(first_round, key=lambda layer: first_round[layer])
    assert first_round[late] >= 4
    start = {path: w.clone() for path, w in weights_of(made.decoder, late).items()}
    run(made)
    moved = weights_of(made.decoder, late)
    assert all((moved[path] - start[path]).abs().max() > 1e-3 for path in start)


@pytest.mark.parametrize("method", ["lisa", "lisa-lora", "lisa-delta"])
@pytest.mark.parametrize("state", ["reset", "keep-host"])
def test_bytes_are_constant_over_twenty_switches_and_those_of_the_ledger(tiny_model, method, state):
    made, plan = job(tiny_model, method=method, steps=22, lisa_interval=1, lisa_state=state)
    rounds = run(made).state.round_bytes
    sizes = {line.what: line.bytes for line in plan.ledger if line.where == "gpu"}
    held = sizes["optimizer states"] + sizes.get("trained weights", 0) + sizes.get("gradients", 0)
    share = 2 / LAYERS
    adapters = (1 + share) * sizes["adapter weights"] - sizes["adapter weights"] if method == "lisa-lora" else 0
    held += sizes.get("adapter gradients", 0) + adapters
    assert len(rounds) == 22 and {*rounds} == {held}
    assert sum(len(state) > 0 for state in made.optimizer.state.values()) == len(made.lisa.parameters)


def test_after_a_switch_what_is_stored_is_the_rounded_master(tiny_model):
    made, _ = job(tiny_model, dtype="bf16", lr=1e-4, steps=4)
    (leaving,) = {*made.lisa.sampler.sample(0)} - {*made.lisa.sampler.sample(1)} or {made.lisa.sampler.sample(0)[0]}
    masters = {}

    def look():
        if not masters or (len(masters) and made.decoder.layers[leaving].input_layernorm.weight.dtype == torch.float32):
            masters.update({path: w.clone() for path, w in weights_of(made.decoder, leaving).items()})

    run(made, look)
    stored = weights_of(made.decoder, leaving)
    assert leaving not in made.lisa.sampler.sample(1)
    assert all(w.dtype == torch.bfloat16 for w in stored.values())
    assert all(torch.equal(stored[path], masters[path].to(torch.bfloat16)) for path in stored)
    assert any(not torch.equal(stored[path].float(), masters[path]) for path in stored)


def test_entering_layers_start_with_fresh_states(tiny_model):
    made, _ = job(tiny_model, lisa_layers=1, steps=6)
    counts = run(made, lambda: {int(s["step"]) for s in made.optimizer.state.values()}).seen
    assert counts == [{1}, {2}] * 3 and all(
        made.lisa.sampler.sample(i) != made.lisa.sampler.sample(i + 1) for i in (0, 1)
    )


def test_kept_states_come_back(tiny_model):
    made, _ = job(tiny_model, lisa_layers=1, steps=24, lisa_state="keep-host")
    steps, turns = run(made, lambda: {int(s["step"]) for s in made.optimizer.state.values()}).seen, {}
    for number in range(12):
        layer = made.lisa.sampler.sample(number)[0]
        turns[layer] = turns.get(layer, 0) + 1
        assert steps[2 * number + 1] == {2 * turns[layer]}


@pytest.mark.parametrize("recompute", ["none", "layer"])
def test_the_backward_pass_stops_at_the_lowest_active_layer(tiny_model, recompute):
    made, _ = job(tiny_model, lisa_layers=1, recompute=recompute)
    lowest, batch, passed = made.lisa.sampler.sample(0)[0], made.batches.get(0), []
    assert lowest > 0
    for index, layer in enumerate(made.decoder.layers):
        layer.register_forward_hook(lambda m, i, out, index=index: passed.append((index, out.requires_grad)))
    made.decoder(batch.input_ids, batch.position_ids, batch.segments).sum().backward()
    forward, again = passed[:LAYERS], passed[LAYERS:]
    assert [index for index, _ in forward] == list(range(LAYERS))
    if recompute == "none":
        assert [needed for _, needed in forward] == [index >= lowest for index in range(LAYERS)]
    else:
        assert [index for index, _ in again] == list(range(LAYERS - 1, lowest - 1, -1))


@pytest.mark.parametrize("state", ["reset", "keep-host"])
def test_streamed_layers_give_the_losses_of_resident_ones(tiny_model, state):
    losses = [
        run(job(tiny_model, streamed, recompute="layer", lisa_state=state, steps=16)[0]).losses
        for streamed in (False, True)
    ]
    assert losses[0] == losses[1] and len({*losses[0]}) == 16


def test_quantised_layers_stay_as_they_are_until_their_turn_and_never_come_back(tiny_model):
    losses = []
    for streamed in (False, True):
        made, _ = job(tiny_model, streamed, quant="nf4", recompute="layer", steps=16)
        original = made.lisa.home.original
        active = made.lisa.sampler.sample(0)[0]
        linear = made.decoder.layers[active].self_attn.q_proj
        assert isinstance(linear, TrainedLinear)
        assert torch.equal(linear.weight, original.read(f"model.layers.{active}.self_attn.q_proj.weight"))
        losses.append(run(made).losses)
        visited = {layer for number in range(8) for layer in made.lisa.sampler.sample(number)}
        made.lisa.end()
        assert {int(name.split(".")[2]) for name in made.lisa.home.trained()} == visited
        assert all(tensor.dtype == torch.float32 for tensor in made.lisa.home.trained().values())
        for layer in range(LAYERS):
            kept = made.decoder.streamer.host.weights(layer) if layer in made.decoder.streamer else None
            form = "nf4" if layer not in visited else "fp32"
            if kept:
                assert {field.form for field in made.decoder.streamer.host.layout(layer).fields} == {form}
    assert losses[0] == losses[1]


def test_a_low_rank_change_of_full_rank_is_the_change(tiny_model):
    made, _ = job(tiny_model, method="lisa-delta", lora_r=112, steps=4)
    batch = made.batches.get(0)

    def loss() -> torch.Tensor:
        with torch.no_grad():
            return made.decoder(batch.input_ids, batch.position_ids, batch.segments)

    run(made)
    before = loss()
    made.lisa.end()
    torch.testing.assert_close(loss(), before, rtol=1e-4, atol=1e-4)  # float32 through a decomposition
    assert 0 < made.lisa.home.errors.max() < 1e-4


def test_the_error_of_a_low_rank_change_is_what_is_left_out(tiny_model):
    made, _ = job(tiny_model, method="lisa-delta", lora_r=2, steps=2)
    run(made)
    made.lisa.end()
    errors = dict(enumerate(made.lisa.home.errors.tolist()))
    assert {layer for layer, error in errors.items() if error} == {*made.lisa.sampler.sample(0)}
    assert all(0.1 < errors[layer] < 1 for layer in made.lisa.sampler.sample(0))
    change = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(change)
    left, right = low_rank(change, 3)
    assert (change - left @ right).norm() == pytest.approx(values[3:].norm().item(), rel=1e-4)
    left, right = low_rank(change, 9)
    torch.testing.assert_close(left @ right, change, rtol=1e-4, atol=1e-5)
    assert left.shape == (7, 9) and not left[:, 5:].any()


def test_only_the_adapters_of_the_round_change(tiny_model):
    made, _ = job(tiny_model, method="lisa-lora", steps=12)

    def look():
        return {path: digest({n: t.detach() for n, t in a.named_parameters()}) for path, a in made.adapters.items()}

    before = look()
    for number, after in enumerate(run(made, look).seen):
        within = tuple(f"model.layers.{layer}." for layer in made.lisa.sampler.sample(number // 2))
        assert {path for path in after if after[path] != before[path]} == {p for p in after if p.startswith(within)}
        before = after


def test_a_trial_of_the_extremes_leaves_no_trace(tiny_model):
    for fields in ({}, {"quant": "nf4"}, {"method": "lisa-delta"}, {"method": "lisa-lora"}):
        losses = []
        for tried in (False, True):
            base = find_base(str(tiny_model("llama", layers=LAYERS)))
            made, plan = job(tiny_model, **fields)
            asked = resolve(recipe(model=str(base.folder), batch_size=2, max_seq_len=24, **{
                "method": "lisa", "quant": "none", "lisa_interval": 2, "lr": 1e-2, "max_steps": 12, "grad_accum": 1,
                "optimizer": "adamw", "fit": "resident", "schedule": "constant", "warmup": 0.0, "dtype": "fp32",
                "lisa_train_embeddings": False if "method" not in fields else None, **fields,
            }), plan)  # fmt: skip
            made = assemble(asked, base, make_batches(tokens(), asked), CPU)
            if tried:
                probe(made.decoder, [made.batches.get(0)], made.optimizer, Clock(), Meter(CPU))
            made.lisa.begin(0)
            losses.append(run(made).losses)
        assert losses[0] == losses[1]


def test_what_cannot_take_turns_is_refused(tiny_model):
    with pytest.raises(InputError, match="--lisa-layers 7"):
        job(tiny_model, lisa_layers=7)
    assert extremes(6, 1) == (0,) and extremes(6, 3) == (0, 1, 5) and extremes(6, 6) == (0, 1, 2, 3, 4, 5)
