"""Synthetic weights depend on seed, name and shape alone, and look like a fresh model's."""

import math

import pytest
import torch

from effitrain.core.errors import InputError
from effitrain.core.presets import find_preset, preset_names
from effitrain.core.spec import spec_from_config
from effitrain.io import synthetic
from effitrain.io.nf4 import nf4_code
from effitrain.io.synthetic import NF4_RMS, SyntheticCheckpoint, shapes_of

NAME = "model.layers.0.mlp.up_proj.weight"
SHAPES = {
    "model.embed_tokens.weight": (333, 101),
    NAME: (500, 300),
    "model.layers.0.mlp.up_proj.bias": (500,),
    "model.layers.0.input_layernorm.weight": (300,),
}


def checkpoint(seed: int = 0, nf4: bool = False, dtype: torch.dtype = torch.float32) -> SyntheticCheckpoint:
    return SyntheticCheckpoint(SHAPES, seed, nf4, dtype)


def parts(weight) -> list[torch.Tensor]:
    return [weight.packed, weight.absmax, weight.nested_absmax, weight.offset]


def test_mixing_is_splitmix64():
    # First outputs of the reference implementation (prng.di.unimi.it/splitmix64.c) for the state 1234567,
    # which it advances before it mixes.
    out = synthetic._mix(torch.arange(1, 4), 1234567)
    assert [value % 2**64 for value in out.tolist()] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("name", SHAPES)
def test_dense_weights_do_not_depend_on_chunks(name, monkeypatch):
    whole = checkpoint().read(name)
    monkeypatch.setattr(synthetic, "_CHUNK", 4096)
    assert torch.equal(checkpoint().read(name), whole)
    assert whole.shape == SHAPES[name] and whole.dtype == torch.float32


def test_nf4_weights_do_not_depend_on_chunks(monkeypatch):
    whole = checkpoint(nf4=True).read_nf4(NAME)
    monkeypatch.setattr(synthetic, "_CHUNK", 4096)
    chunked = checkpoint(nf4=True).read_nf4(NAME)
    assert all(torch.equal(a, b) for a, b in zip(parts(whole), parts(chunked), strict=True))


def test_bytes_are_pinned():
    """A change of generator would make old benchmark records incomparable."""
    assert checkpoint(seed=7).read("model.embed_tokens.weight").view(-1)[:3].tolist() == [
        0.019834225997328758,
        -0.03132227063179016,
        0.025561533868312836,
    ]
    assert checkpoint(seed=7, nf4=True).read_nf4(NAME).packed.view(-1)[:6].tolist() == [37, 159, 123, 197, 176, 71]


def test_seed_and_name_decide():
    base = checkpoint().read(NAME)
    other = SyntheticCheckpoint({"x": SHAPES[NAME]}, 0, False, torch.float32).read("x")
    assert not torch.equal(base, checkpoint(seed=1).read(NAME)) and not torch.equal(base, other)
    assert torch.equal(base, checkpoint().read(NAME))
    assert len({checkpoint().fingerprint(), checkpoint(1).fingerprint(), checkpoint(nf4=True).fingerprint()}) == 3
    assert checkpoint().fingerprint() == checkpoint().fingerprint()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dense_weights_look_like_a_fresh_models(dtype):
    weight = checkpoint(dtype=dtype).read(NAME)
    assert weight.dtype == dtype
    values = weight.float()
    # 150,000 draws: the standard error of the mean is 5e-5, that of the deviation less.
    assert abs(values.mean()) < 2e-4 and abs(values.std() - 0.02) < 2e-4
    assert abs(torch.corrcoef(torch.stack([values[:, :-1].flatten(), values[:, 1:].flatten()]))[0, 1]) < 0.01
    assert torch.equal(
        checkpoint(dtype=dtype).read("model.layers.0.input_layernorm.weight"), torch.ones(300, dtype=dtype)
    )


def test_nf4_weights_look_like_a_fresh_models():
    import bitsandbytes.functional as bnb

    weight = checkpoint(nf4=True).read_nf4(NAME)
    state = weight.to_state(NAME, torch.float32)
    values = bnb.dequantize_4bit(state.pop(NAME), bnb.QuantState.from_dict(state, device=torch.device("cpu")))
    assert values.shape == SHAPES[NAME] and torch.isfinite(values).all()
    # The mean of the 16 codes is 0.023 of the largest, not 0: NF4 itself is not symmetric.
    assert abs(values.mean()) < 1.5e-3 and abs(values.std() - 0.02) < 4e-4
    blocks = math.ceil(values.numel() / 64)
    assert [tuple(part.shape) for part in parts(weight)] == [(75_000, 1), (blocks,), (math.ceil(blocks / 256),), ()]


def test_only_matrices_of_decoder_linears_are_nf4():
    assert [name for name in SHAPES if checkpoint(nf4=True).is_nf4(name)] == [NAME]
    assert not any(checkpoint().is_nf4(name) for name in SHAPES)


def test_unknown_name():
    with pytest.raises(InputError, match=r"no tensor lm_head.weight"):
        checkpoint().read("lm_head.weight")
    assert not checkpoint().has("lm_head.weight") and checkpoint().has(NAME)
    assert checkpoint().names() == list(SHAPES) and checkpoint().shape(NAME) == (500, 300)


@pytest.mark.parametrize("name", preset_names())
def test_shapes_count_the_models_parameters(name):
    preset = find_preset(name)
    assert preset is not None
    spec = spec_from_config(preset.config, name)
    assert sum(math.prod(shape) for shape in shapes_of(spec).values()) == spec.params


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_shapes_are_those_transformers_saves(family, tied, tiny_model):
    from effitrain.io.checkpoint import open_checkpoint
    from effitrain.io.model_folder import read_config

    folder = tiny_model(family, tied=tied)
    stored = open_checkpoint(folder)
    assert shapes_of(spec_from_config(read_config(folder), family)) == {n: stored.shape(n) for n in stored.names()}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_same_bytes_on_cuda():
    ours = [checkpoint(dtype=torch.bfloat16).read(NAME), *parts(checkpoint(nf4=True).read_nf4(NAME))]
    theirs = [checkpoint(dtype=torch.bfloat16).read(NAME, "cuda"), *parts(checkpoint(nf4=True).read_nf4(NAME, "cuda"))]
    assert all(torch.equal(a, b.cpu()) for a, b in zip(ours, theirs, strict=True))


def test_the_root_mean_square_of_the_code():
    assert nf4_code().square().mean().sqrt().item() == NF4_RMS
