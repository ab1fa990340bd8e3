"""What must be pruned together: FFN channels, and KV heads with the query heads they serve.

A channel of the FFN is a row of gate and up and a column of down. KV head j is ``head_dim`` rows of k and v, and the
rows of q and columns of o of the query heads that read it. Those lie next to each other: transformers repeats each KV
head ``num_heads / num_kv_heads`` times in place. All of that follows from the axes in the model's spec;
``check_family`` has torch-pruning find the FFN's members on its own. Its rule for attention cuts grouped heads wrongly.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effitrain.core.errors import InputError
from effitrain.core.positions import without_scaling
from effitrain.core.spec import Axis, LayerSpec, LinearSpec, spec_from_config

PARTS = {"ffn": Axis.FFN, "kv": Axis.KV_HEADS}  # by the names that --prune-parts uses
_AXES = {Axis.FFN: {Axis.FFN}, Axis.KV_HEADS: {Axis.KV_HEADS, Axis.HEADS}}


@dataclass(frozen=True)
class Member:
    """A side of a linear that belongs to a part: its rows (``dim`` 0) or columns (``dim`` 1)."""

    linear: LinearSpec
    dim: int


def members(layer: LayerSpec, part: Axis) -> list[Member]:
    """The sides that lose a slice each when a group of ``part``, FFN or KV_HEADS, goes."""
    rows = [Member(linear, 0) for linear in layer.linears if linear.out_axis in _AXES[part]]
    return rows + [Member(linear, 1) for linear in layer.linears if linear.in_axis in _AXES[part]]


def per_group(values: Tensor, groups: int) -> Tensor:
    """Sums over the channels of each group: [channels] to [groups]; a group's channels lie next to each other."""
    return values.view(groups, -1).sum(1)


def check_family(config: Mapping[str, Any], name: str) -> None:
    """Compare the FFN's members with those that torch-pruning traces on a small model of the family; takes seconds.

    Raises:
        InputError: they differ, so pruning by them would damage the model.
    """
    stub = {**without_scaling(config), "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48,
            "vocab_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
            "max_position_embeddings": 32, "layer_types": None, "tie_word_embeddings": False}  # fmt: skip
    known = {(m.linear.name, m.dim) for m in members(spec_from_config(stub, name).layers[0], Axis.FFN)}
    traced = _traced(stub)
    if traced != known:
        raise InputError(
            f"{name} is built in a way that pruning does not know: a channel of its FFN is {sorted(traced)},"
            f" expected {sorted(known)}.",
            next_step="Train it whole: effitrain run --fit resident, or --fit stream.",
        )


def _traced(config: Mapping[str, Any]) -> set[tuple[str, int]]:
    """Names and dims that fall with a row of the first layer's gate, by torch-pruning's graph; no memory is used."""
    import transformers
    from torch._subclasses.fake_tensor import FakeTensorMode

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library warns of the norms' parameters, which stay whole
        import torch_pruning

        with FakeTensorMode():
            hf_config = transformers.AutoConfig.for_model(**config)
            hf_config.use_cache = False
            model = transformers.AutoModelForCausalLM.from_config(hf_config)
            graph = torch_pruning.DependencyGraph().build_dependency(
                model, {"input_ids": torch.zeros(1, 8, dtype=torch.long)}, output_transform=lambda out: out.logits
            )
            layer = model.model.layers[0]
            cut = torch_pruning.prune_linear_out_channels
            group = graph.get_pruning_group(layer.mlp.gate_proj, cut, idxs=[1])
    names = {id(module): name for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}
    return {
        (names[id(dep.target.module)], 0 if dep.handler == cut else 1)
        for dep, _ in group
        if id(dep.target.module) in names
    }
