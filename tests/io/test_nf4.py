"""Our NF4 layout is bitsandbytes', field by field and table by table."""

import json

import pytest
import torch

from effitrain.core.errors import InputError
from effitrain.io.nf4 import STATE, NF4Tensor, dynamic_code, nf4_code


@pytest.fixture(scope="module")
def bnb():
    import bitsandbytes.functional

    return bitsandbytes.functional


def quantised(bnb, *shape: int):
    """A random weight in NF4 as bitsandbytes holds it: packed bytes and their state."""
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    return bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")


def saved(bnb, *shape: int) -> dict[str, torch.Tensor]:
    """The same as transformers saves it for a weight named w."""
    packed, state = quantised(bnb, *shape)
    return {"w": packed, **{f"w.{key}": value for key, value in state.as_dict(packed=True).items()}}


def test_tables_are_those_of_bitsandbytes(bnb):
    assert torch.equal(nf4_code(), bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(dynamic_code(), bnb.create_dynamic_map())


# Whole blocks, a part of a block, an odd number of weights, more than one block of scales.
@pytest.mark.parametrize("shape", [(64, 64), (5, 7), (3, 100), (160, 257)])
def test_fields_map_one_to_one(bnb, shape):
    packed, state = quantised(bnb, *shape)
    weight = NF4Tensor.from_state("w", saved(bnb, *shape))
    elements = shape[0] * shape[1]
    blocks = -(-elements // 64)
    for ours, theirs, size in (
        (weight.packed, packed, (-(-elements // 2), 1)),
        (weight.absmax, state.absmax, (blocks,)),
        (weight.nested_absmax, state.state2.absmax, (-(-blocks // 256),)),
        (weight.offset, state.offset, ()),
    ):
        assert ours.dtype == theirs.dtype and tuple(ours.shape) == size and torch.equal(ours, theirs)
    assert weight.shape == shape == tuple(state.shape)
    assert (weight.blocksize, weight.nested_blocksize) == (state.blocksize, state.state2.blocksize)
    assert weight.nbytes == -(-elements // 2) + blocks + 4 * -(-blocks // 256) + 4


def test_bitsandbytes_reads_our_state(bnb):
    packed, state = quantised(bnb, 160, 257)
    written = NF4Tensor.from_state("w", saved(bnb, 160, 257)).to_state("w", torch.float32)
    assert torch.equal(written.pop("w"), packed)
    read = bnb.QuantState.from_dict(written, device=torch.device("cpu"))
    assert torch.equal(bnb.dequantize_4bit(packed, read), bnb.dequantize_4bit(packed, state))
    assert read.dtype == torch.float32


def test_state_round_trip(bnb):
    tensors = saved(bnb, 5, 7)
    again = NF4Tensor.from_state("w", tensors).to_state("w", torch.float32)
    assert json.loads(bytes(again[f"w.{STATE}"].tolist())) == json.loads(bytes(tensors[f"w.{STATE}"].tolist()))
    assert all(torch.equal(again[key], tensors[key]) for key in tensors if not key.endswith(STATE))
    assert set(again) == set(tensors)


def test_to_moves_every_part(bnb):
    weight = NF4Tensor.from_state("w", saved(bnb, 5, 7))
    moved = weight.to("meta")
    parts = (moved.packed, moved.absmax, moved.nested_absmax, moved.offset)
    assert {part.device.type for part in parts} == {"meta"} and moved.nbytes == weight.nbytes
    assert weight.to("cpu").packed.data_ptr() == weight.packed.data_ptr()


def test_other_storage_dtype_holds_the_same_bytes(bnb):
    tensors = saved(bnb, 64, 64)
    wide = {**tensors, "w": tensors["w"].view(-1).view(torch.bfloat16).view(-1, 1)}
    assert torch.equal(NF4Tensor.from_state("w", wide).packed, tensors["w"])


def with_state(tensors: dict[str, torch.Tensor], **changes: object) -> dict[str, torch.Tensor]:
    state = {**json.loads(bytes(tensors[f"w.{STATE}"].tolist())), **changes}
    return {**tensors, f"w.{STATE}": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if "nested" not in k}, "no nested_absmax.*without double quant"),
        (lambda t: {k: v for k, v in t.items() if k != "w.quant_map"}, "w has no quant_map"),
        (lambda t: with_state(t, blocksize=128), "w has blocks of 128 and 256"),
        (lambda t: {**t, "w.quant_map": t["w.quant_map"] * 2}, "w has a quant_map of its own"),
        (lambda t: {**t, f"w.{STATE}": t[f"w.{STATE}"][:-3]}, "w has a quant_state .* damaged"),
    ],
)
def test_other_quantisation_is_refused(bnb, change, message):
    with pytest.raises(InputError, match=message) as error:
        NF4Tensor.from_state("w", change(saved(bnb, 64, 64)))
    assert "Name the original 16-bit model" in str(error.value)
