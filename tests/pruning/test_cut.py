"""Cutting: the same function as masking, bit-exact selections, folders that load here and in stock transformers."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from effitrain.core.cut import cut_widths
from effitrain.core.errors import InputError
from effitrain.core.keep import KeepMap, LayerKeep
from effitrain.core.spec import Axis
from effitrain.io.checkpoint import open_checkpoint
from effitrain.io.keep import read_keep
from effitrain.model.load import fill, find_base
from effitrain.pruning.cut import CutWeights, write_cut
from effitrain.pruning.score import score_layers
from effitrain.pruning.select import select
from effitrain.quant.nf4 import quantize
from effitrain.stream.fresh import FreshLayers

from .conftest import CPU, mask, stock_logits

SHAPES = {
    "llama 8/2": ("llama", {"heads": 8, "kv_heads": 2, "hidden": 64}),
    "llama 6/2": ("llama", {"heads": 6, "kv_heads": 2, "hidden": 48}),
    "llama 64/8": ("llama", {"heads": 64, "kv_heads": 8, "hidden": 256}),
    "llama 4/4": ("llama", {"heads": 4, "kv_heads": 4, "hidden": 64}),
    "mistral": ("mistral", {"heads": 8, "kv_heads": 2, "hidden": 64}),
    "qwen2": ("qwen2", {"heads": 6, "kv_heads": 3, "hidden": 48}),
    "qwen3": ("qwen3", {"heads": 8, "kv_heads": 4, "hidden": 64}),
    "gemma": ("gemma", {"heads": 4, "kv_heads": 2, "hidden": 64, "tied": True}),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [0, 1])
def test_cut_is_masked(model, text, uneven, shape, seed):
    """Tolerance 1e-5 of the logits' size: sums of other lengths round differently in float32."""
    family, sizes = SHAPES[shape]
    full = model(family, layers=3, **sizes)
    keep = uneven(full.spec, seed)
    assert any(len(layer.kv_heads) < full.spec.num_kv_heads for layer in keep.layers)
    weights = CutWeights(full.weights, full.spec, keep)
    small = fill(full.empty(full.spec.resized(keep.widths)), weights, "none", torch.float32, CPU).eval()
    (batch,) = text(1)
    with torch.no_grad():
        logits = small.logits(small(batch.input_ids, batch.position_ids, batch.segments))
    expected = stock_logits(mask(full.stock(), keep), batch)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    whole = stock_logits(full.stock(), batch)
    assert (whole - expected).abs().max() > 1e-2 * whole.abs().max()  # what was dropped did matter


def test_every_tensor_is_a_selection(model, uneven):
    full = model("qwen2", heads=6, kv_heads=3, hidden=48)
    keep = uneven(full.spec)
    cut, whole = CutWeights(full.weights, full.spec, keep), full.weights
    for layer in full.spec.layers:
        for linear in layer.linears:
            name = f"model.layers.{layer.index}.{linear.name}"
            rows = keep.indices(layer.index, linear.out_axis) or list(range(linear.out_features))
            columns = keep.indices(layer.index, linear.in_axis) or list(range(linear.in_features))
            assert torch.equal(cut.read(f"{name}.weight"), whole.read(f"{name}.weight")[rows][:, columns])
            assert cut.shape(f"{name}.weight") == (len(rows), len(columns))
            if linear.bias:
                assert torch.equal(cut.read(f"{name}.bias"), whole.read(f"{name}.bias")[rows])
    assert torch.equal(cut.read("model.norm.weight"), whole.read("model.norm.weight"))


def test_the_folder_holds_the_view_byte_for_byte_and_loads(model, text, uneven, tmp_path):
    full = model("llama", heads=8, kv_heads=2)
    keep = uneven(full.spec, fingerprint=full.weights.fingerprint())
    cut = CutWeights(full.weights, full.spec, keep)
    write_cut(tmp_path / "small", cut, full.base.source.config, full.folder)
    stored = open_checkpoint(tmp_path / "small")
    assert sorted(stored.names()) == sorted(cut.names())
    assert all(torch.equal(stored.read(name), cut.read(name)) for name in cut.names())
    assert read_keep(tmp_path / "small") == keep
    base = find_base(str(tmp_path / "small"))
    assert base.spec.layers == full.spec.resized(keep.widths).layers
    assert base.tokenizer().encode("abc") == full.base.tokenizer().encode("abc")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small"]


def test_uniform_widths_load_in_stock_transformers(model, text, tmp_path):
    full = model("qwen3", heads=8, kv_heads=4)
    widths = cut_widths(full.spec, 0.5, exempt=(0, 0))
    scores = score_layers("random", full.walk(), [0, 1], [Axis.FFN, Axis.KV_HEADS], 1)
    keep = KeepMap.of(full.spec, select(full.spec, widths, scores), "full", "")
    write_cut(tmp_path / "small", CutWeights(full.weights, full.spec, keep), full.base.source.config, full.folder)
    assert "effitrain_widths" not in json.loads((tmp_path / "small/config.json").read_text())
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)
    (batch,) = text(1)
    masked = stock_logits(mask(full.stock(), keep), batch)
    torch.testing.assert_close(stock_logits(stock, batch), masked, rtol=1e-5, atol=1e-5 * masked.abs().max().item())


def test_ratio_zero_is_the_model_itself(model):
    full = model()
    whole = LayerKeep(tuple(range(full.spec.ffn)), (0, 1))
    cut = CutWeights(full.weights, full.spec, KeepMap.of(full.spec, [whole] * 2, "full", ""))
    assert all(torch.equal(cut.read(name), full.weights.read(name)) for name in full.weights.names())


def test_an_interrupted_cut_leaves_nothing(model, uneven, tmp_path):
    full = model()
    cut = CutWeights(full.weights, full.spec, uneven(full.spec))

    def stop(name):
        if "layers.1" in name:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_cut(tmp_path / "small", cut, full.base.source.config, full.folder, progress=stop)
    assert not list(tmp_path.iterdir())


def test_a_quantised_base_is_refused(model, uneven, tmp_path):
    full = model()

    class Quantised(type(full.weights)):
        def is_nf4(self, name):
            return name.endswith("up_proj.weight")

    weights = Quantised(**vars(full.weights))
    with pytest.raises(InputError, match="NF4") as caught:
        CutWeights(weights, full.spec, uneven(full.spec))
    assert "16-bit" in caught.value.next_step


def test_the_keep_map_of_another_model_is_refused(model, uneven):
    with pytest.raises(InputError, match="belongs to another model"):
        CutWeights(model().weights, model().spec, uneven(model(layers=3).spec))


def test_a_config_changed_by_hand_is_refused(model, uneven, tmp_path):
    full = model("llama", heads=8, kv_heads=2)
    write_cut(
        tmp_path / "small", CutWeights(full.weights, full.spec, uneven(full.spec)), full.base.source.config, full.folder
    )
    config = json.loads((tmp_path / "small/config.json").read_text())
    for bad in ({"ffn": [1], "kv_heads": [1]}, {"ffn": [1, 999], "kv_heads": [1, 1]}, [3], {"ffn": [1, 1]}):
        (tmp_path / "small/config.json").write_text(json.dumps({**config, "effitrain_widths": bad}))
        with pytest.raises(InputError, match="effitrain_widths"):
            find_base(str(tmp_path / "small"))
    shutil.rmtree(tmp_path / "small")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cutting_into_nf4_is_cutting_and_then_quantising_byte_for_byte(model, uneven, tmp_path, dtype):
    """The same store of layers comes of both, and no 16-bit matrix lies in the folder."""
    full = model("qwen3", heads=8, kv_heads=4, layers=3)
    keep = uneven(full.spec, fingerprint=full.weights.fingerprint())
    cut, config = CutWeights(full.weights, full.spec, keep), full.base.source.config
    write_cut(tmp_path / "plain", cut, config, full.folder)
    write_cut(tmp_path / "nf4", cut, config, full.folder, quantize=lambda matrix: quantize(matrix.to(dtype)))
    stored, plain = open_checkpoint(tmp_path / "nf4"), open_checkpoint(tmp_path / "plain")
    assert sorted(stored.names()) == sorted(plain.names())
    matrices = [name for name in plain.names() if cut.is_matrix(name)]
    assert len(matrices) == 3 * 7 and all(stored.is_nf4(name) for name in matrices)
    spec = find_base(str(tmp_path / "nf4")).spec
    blobs = []
    for weights in (stored, plain):
        layers = FreshLayers(spec, weights, "nf4", {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype])
        blobs.append([torch.zeros(layers.layout(i).nbytes, dtype=torch.uint8) for i in range(3)])
        for layer, blob in enumerate(blobs[-1]):
            layers.read_into(layer, blob)
    assert all(torch.equal(one, other) for one, other in zip(*blobs, strict=True))
    size, whole = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("nf4", "plain"))
    tables = sum(plain.read(name).nbytes for name in plain.names() if name not in matrices)
    assert size - tables < 0.4 * (whole - tables)  # float32: an eighth, and the code tables of matrices this small


def test_a_uniform_small_model_in_nf4_loads_in_stock_transformers(model, text, tmp_path):
    """Rows of 64 and 128 weights: bitsandbytes' CPU kernel takes a block to begin with each row."""
    full = model("llama", heads=8, kv_heads=4, hidden=128, ffn=128)
    widths = cut_widths(full.spec, 0.5, exempt=(0, 0))
    scores = score_layers("random", full.walk(), [0, 1], [Axis.FFN, Axis.KV_HEADS], 1)
    keep = KeepMap.of(full.spec, select(full.spec, widths, scores), "full", "")
    cut = CutWeights(full.weights, full.spec, keep)
    write_cut(tmp_path / "small", cut, full.base.source.config, full.folder, quantize=quantize)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)
    stock.train()  # in evaluation bitsandbytes packs the weights anew for another kernel
    ours = fill(full.empty(cut.small_spec), open_checkpoint(tmp_path / "small"), "nf4", torch.float32, CPU).eval()
    (batch,) = text(1)
    with torch.no_grad():
        logits = ours.logits(ours(batch.input_ids, batch.position_ids, batch.segments))
    expected = stock_logits(stock, batch)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_nan_does_not_get_into_nf4(model, uneven, tmp_path):
    full = model()

    class Damaged(type(full.weights)):
        def read(self, name, device="cpu"):
            tensor = super().read(name, device)
            return tensor * torch.nan if name.endswith("1.mlp.down_proj.weight") else tensor

    cut = CutWeights(Damaged(**vars(full.weights)), full.spec, uneven(full.spec))
    with pytest.raises(InputError, match=r"model.layers.1.mlp.down_proj.weight holds NaN"):
        write_cut(tmp_path / "small", cut, full.base.source.config, full.folder, quantize=quantize)
    assert not list(tmp_path.iterdir())
