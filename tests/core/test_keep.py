"""The keep map: indices along axes, sizes, and the model it belongs to."""

import pytest

from effitrain.core.errors import InputError
from effitrain.core.keep import KeepMap, LayerKeep
from effitrain.core.spec import Axis, Widths, spec_from_config

SPEC = spec_from_config(
    {"model_type": "llama", "hidden_size": 48, "intermediate_size": 6, "num_hidden_layers": 2, "vocab_size": 9,
     "num_attention_heads": 6, "num_key_value_heads": 3, "max_position_embeddings": 8, "head_dim": 2},
    "mine",
)  # fmt: skip
KEEP = KeepMap.of(SPEC, [LayerKeep((0, 3, 5), (0, 2)), LayerKeep(tuple(range(6)), (0, 1, 2))], "mine", "abc")


def test_a_kv_head_brings_its_rows_and_those_of_its_query_heads():
    assert KEEP.indices(0, Axis.FFN) == [0, 3, 5]
    assert KEEP.indices(0, Axis.KV_HEADS) == [0, 1, 4, 5]
    assert KEEP.indices(0, Axis.HEADS) == [0, 1, 2, 3, 8, 9, 10, 11]


def test_axes_that_are_whole_have_no_indices():
    assert KEEP.indices(0, Axis.MODEL) is None
    assert [KEEP.indices(1, axis) for axis in (Axis.FFN, Axis.KV_HEADS, Axis.HEADS)] == [None] * 3


def test_the_small_models_shape():
    assert KEEP.widths == (Widths(3, 2), Widths(6, 3))
    small = SPEC.resized(KEEP.widths)
    assert {linear.leaf: (linear.out_features, linear.in_features) for linear in small.layers[0].linears} == {
        "q_proj": (8, 48), "k_proj": (4, 48), "v_proj": (4, 48), "o_proj": (48, 8),
        "gate_proj": (3, 48), "up_proj": (3, 48), "down_proj": (48, 3),
    }  # fmt: skip
    assert small.layers[1] == SPEC.layers[1] and small.widths == KEEP.widths


def test_the_map_of_another_model_is_refused():
    KEEP.check(SPEC)
    other = SPEC.resized(SPEC.widths)
    object.__setattr__(other, "num_kv_heads", 6)
    with pytest.raises(InputError, match="belongs to another model") as caught:
        KEEP.check(other)
    assert "mine" in caught.value.next_step
