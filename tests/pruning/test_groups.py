"""Our table of what falls together, against torch-pruning's graph."""

import logging

import pytest
import torch

from effitrain.core.errors import InputError
from effitrain.core.spec import Axis
from effitrain.pruning import groups


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma"])
def test_the_graph_finds_the_same_ffn_members(model, family):
    full = model(family)
    groups.check_family(full.base.source.config, family)
    traced = groups._traced({**full.base.source.config, "vocab_size": 16})
    assert traced == {("mlp.gate_proj", 0), ("mlp.up_proj", 0), ("mlp.down_proj", 1)}


def test_a_model_with_scaled_positions_is_traced_without_a_word(model, monkeypatch, caplog):
    scaled = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512}
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    groups.check_family({**model().base.source.config, "rope_scaling": scaled, "rope_parameters": None}, "yarn")
    assert not caplog.records


def test_members_by_axis(model):
    layer = model().spec.layers[0]
    assert {(m.linear.leaf, m.dim) for m in groups.members(layer, Axis.KV_HEADS)} == {
        ("q_proj", 0), ("k_proj", 0), ("v_proj", 0), ("o_proj", 1),
    }  # fmt: skip


def test_a_group_is_a_run_of_channels():
    assert torch.equal(groups.per_group(torch.arange(6.0), 2), torch.tensor([3.0, 12.0]))


def test_an_unknown_structure_is_refused(model, monkeypatch):
    monkeypatch.setattr(groups, "_traced", lambda config: {("mlp.gate_proj", 0), ("mlp.other", 1)})
    with pytest.raises(InputError, match="pruning does not know") as caught:
        groups.check_family(model().base.source.config, "mine")
    assert "mlp.other" in caught.value.fact
