"""Models whose attention differs a little from what their class says; the sweep over all models found them."""

from transformers import (
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    Gemma3nTextConfig,
    Gemma3nTextModel,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from tests.replace.models import TOKENS, VOCABULARY

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
SIZES |= {"vocab_size": VOCABULARY, "head_dim": 8, "initializer_range": 0.3, **TOKENS}


def gemma3n(shared: int) -> Gemma3nTextModel:
    """Four layers, sliding and full in turn; the last `shared` of them use the keys of earlier layers."""
    config = Gemma3nTextConfig(
        **SIZES,
        num_hidden_layers=4,
        num_kv_shared_layers=shared,
        layer_types=["sliding_attention", "full_attention"] * 2,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=4,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 4,
    )
    return Gemma3nTextModel(config).eval()


def diffllama(**changes) -> DiffLlamaForCausalLM:
    sizes = {name: value for name, value in SIZES.items() if name != "head_dim"}
    return DiffLlamaForCausalLM(DiffLlamaConfig(**sizes, num_hidden_layers=2, **changes)).eval()


def smollm3() -> SmolLM3ForCausalLM:
    """Two layers, the second without positions."""
    sizes = {name: value for name, value in SIZES.items() if name != "head_dim"}
    return SmolLM3ForCausalLM(SmolLM3Config(**sizes, num_hidden_layers=2, no_rope_layers=[1, 0])).eval()
