"""Keep maps on disk."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from effitrain.core.errors import InputError
from effitrain.core.keep import KeepMap, LayerKeep
from effitrain.io.keep import read_keep, write_keep

KEEP = KeepMap(8, 6, 3, 2, (LayerKeep((0, 3, 7), (0, 2)), LayerKeep((1,), (1,))), "the base", "abc")


def test_round_trip(tmp_path):
    write_keep(tmp_path / "keep.safetensors", KEEP)
    assert read_keep(tmp_path) == read_keep(tmp_path / "keep.safetensors") == KEEP
    assert load_file(tmp_path / "keep.safetensors")["layers.0.ffn"].dtype == torch.int32


def test_there_is_none(tmp_path):
    with pytest.raises(InputError, match="no keep map"):
        read_keep(tmp_path)


def test_damaged_files(tmp_path):
    path = tmp_path / "keep.safetensors"
    path.write_bytes(b"nonsense")
    with pytest.raises(InputError, match="not a keep map"):
        read_keep(path)
    save_file({"layers.0.ffn": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="not a keep map"):
        read_keep(path)


@pytest.mark.parametrize(
    "layer", [LayerKeep((3, 0), (0,)), LayerKeep((0, 8), (0,)), LayerKeep((0,), (-1,)), LayerKeep((), (0,))]
)
def test_indices_that_cannot_be(tmp_path, layer):
    write_keep(tmp_path / "keep.safetensors", KeepMap(8, 6, 3, 2, (layer,), "the base", "abc"))
    with pytest.raises(InputError, match="not ascending"):
        read_keep(tmp_path)
