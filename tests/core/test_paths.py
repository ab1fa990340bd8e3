import pytest

from effitrain.core.paths import layer_of, path_of


def test_paths_are_those_of_checkpoints() -> None:
    assert path_of(3) == "model.layers.3"
    assert path_of(0, "self_attn.q_proj") == "model.layers.0.self_attn.q_proj"
    assert path_of(12, "mlp.down_proj", "weight") == "model.layers.12.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("path", "layer"),
    [
        ("model.layers.0", 0),
        ("model.layers.17.mlp.up_proj.weight", 17),
        ("model.layers.x.mlp", None),
        ("model.layers.3x.mlp", None),
        ("model.norm.weight", None),
        ("lm_head.weight", None),
        ("other.model.layers.3.mlp", None),
    ],
)
def test_the_layer_of_a_path(path: str, layer: int | None) -> None:
    assert layer_of(path) == layer
