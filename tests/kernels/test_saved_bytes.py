"""What a Llama layer with LoRA on all linears keeps for backward: ours against stock transformers with stock peft."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaModel, LlamaRotaryEmbedding

from effitrain.adapters.attach import attach
from effitrain.adapters.base import AdapterConfig, Clock
from effitrain.core.spec import spec_from_config
from effitrain.io.synthetic import SyntheticCheckpoint, shapes_of
from effitrain.model.decoder import build
from effitrain.model.load import fill

TOKENS, RANK = 96, 4
# The proportions of Llama 3 8B: F = 3.5 H, four query heads to one of keys.
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 64,
    "intermediate_size": 224, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 1,
    "head_dim": 16, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "tie_word_embeddings": False,
}  # fmt: skip


def _kept(layer, x, run):
    """Bytes of the tensors kept, each storage once; neither the layer's own nor its input."""
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers(), x)}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(size for size, _ in kept.values())


def _peft(x, rope):
    from peft import LoraConfig, get_peft_model

    config = LlamaConfig(**{k: v for k, v in CONFIG.items() if k not in ("model_type", "architectures")})
    config._attn_implementation = "sdpa"
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = LlamaModel(config).to(x.dtype)
    get_peft_model(model, LoraConfig(r=RANK, target_modules=targets))  # whose adapters are float32, as ours are
    return _kept(model.layers[0], x, lambda: model.layers[0](x, attention_mask=None, position_embeddings=rope))


def _ours(x, rope):
    spec = spec_from_config(CONFIG, "trial")
    decoder = fill(
        build(spec, CONFIG, "trial"), SyntheticCheckpoint(shapes_of(spec), 0, True, x.dtype), "nf4", x.dtype, x.device
    )
    attach(decoder, AdapterConfig(r=RANK), Clock(0))
    layer = decoder.layers[0]
    return _kept(layer, x, lambda: layer(x, attention_mask=None, position_embeddings=rope))


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft calls what transformers has deprecated
def test_at_most_half_of_what_peft_keeps():
    x = torch.randn(1, TOKENS, 64, dtype=torch.bfloat16, requires_grad=True)
    rope = LlamaRotaryEmbedding(LlamaConfig(hidden_size=64, num_attention_heads=4))(x, torch.arange(TOKENS)[None])
    ours, peft = _ours(x, rope), _peft(x, rope)
    # peft keeps each linear's input in the adapter's float32 too. Ours, in H a token: the outputs of both norms, the
    # sum between them, attention's q, k, v and output, gate and up: 12.5 at these proportions, and the low ranks.
    assert ours <= peft / 2, f"ours {ours / TOKENS:.0f} bytes a token, peft's {peft / TOKENS:.0f}"
    assert ours <= 1.1 * TOKENS * x.element_size() * (12.5 * 64 + 7 * RANK)
