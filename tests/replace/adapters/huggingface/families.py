"""Tiny random models of the families that people use, of their real classes, each with inputs for it.

Widths and head counts differ on purpose: a mix-up of heads, key-value heads and widths then shows as a wrong shape.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn

from tests.replace.models import TOKENS, VOCABULARY, padded, tokens

LENGTH = 37  # of token sequences; images and sounds give about as many positions
_WIDE = 0.3  # initial weights large enough that attention differs between keys
_PLAIN = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_TEXT = {**_PLAIN, "vocab_size": VOCABULARY, "initializer_range": _WIDE, "max_position_embeddings": 256}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_GROUPED = {**_TEXT, **TOKENS, "num_key_value_heads": 2, "head_dim": 8}


@dataclass(frozen=True)
class Family:
    """How to build a model of one family, and its inputs."""

    model: str  # the class of the model
    config: str  # the class of its config
    options: dict  # of the config
    inputs: Callable[[], dict[str, Tensor]]
    rotary: bool = False
    part: str = ""  # the submodule to use, default the whole model

    def build(self, **changes) -> nn.Module:
        """The model, in eval mode; random weights of a fixed seed."""
        config = getattr(transformers, self.config)(**{**self.options, **changes})
        torch.manual_seed(0)
        return getattr(transformers, self.model)(config).eval().get_submodule(self.part)

    def real(self, output: Tensor) -> Tensor:
        """The rows (B, L, C) -> (N, C) of the output that are not padding."""
        mask = self.inputs().get("attention_mask")
        return output.flatten(0, 1) if mask is None else output[mask.bool()]


def _padded() -> dict[str, Tensor]:
    return padded("right", length=LENGTH)


def _padded_ids() -> dict[str, Tensor]:
    inputs = padded("right", length=LENGTH)
    del inputs["position_ids"]
    return inputs


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _image() -> dict[str, Tensor]:
    return {"pixel_values": _random(2, 3, 24, 24)}  # 36 patches of 4 x 4


_VISION = {**_PLAIN, **_NO_DROPOUT, "image_size": 24, "patch_size": 4, "initializer_range": _WIDE}
_DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "dropout": 0.0, "attention_dropout": 0.0}
_WAV = {"conv_dim": (16, 16), "conv_kernel": (5, 3), "conv_stride": (4, 2), "num_feat_extract_layers": 2}
_WAV |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False}
_WAV |= {"layerdrop": 0.0, "activation_dropout": 0.0, "attention_dropout": 0.0, "hidden_dropout": 0.0}
_WHISPER = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
_WHISPER |= {"decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "num_mel_bins": 8}
_WHISPER |= {"max_source_positions": LENGTH, "vocab_size": VOCABULARY, "init_std": _WIDE, "dropout": 0.0, **TOKENS}
_FULL = {"layer_types": ["full_attention"] * 2}
ENCODERS = {
    "bert": Family("BertModel", "BertConfig", {**_TEXT, **_NO_DROPOUT}, _padded),
    # The proportions of all-MiniLM-L6: head_dim 32, a feed-forward of four times the width, more layers.
    "minilm": Family(
        "BertModel",
        "BertConfig",
        {**_TEXT, **_NO_DROPOUT, "hidden_size": 96, "num_attention_heads": 3, "intermediate_size": 384}
        | {"num_hidden_layers": 3, "initializer_range": 0.15},
        _padded,
    ),
    "roberta": Family("RobertaModel", "RobertaConfig", {**_TEXT, **_NO_DROPOUT, **TOKENS}, _padded_ids),
    "distilbert": Family(
        "DistilBertModel",
        "DistilBertConfig",
        {**_DISTIL, "vocab_size": VOCABULARY, "max_position_embeddings": 256, "initializer_range": _WIDE},
        _padded_ids,
    ),
    "electra": Family("ElectraModel", "ElectraConfig", {**_TEXT, **_NO_DROPOUT, "embedding_size": 24}, _padded),
    "modernbert": Family("ModernBertModel", "ModernBertConfig", {**_TEXT, **TOKENS, **_FULL}, _padded, rotary=True),
    "vit": Family("ViTModel", "ViTConfig", _VISION, _image),
    "dinov2": Family("Dinov2Model", "Dinov2Config", {**_VISION, "mlp_ratio": 2}, _image),
    "clip vision": Family("CLIPVisionModel", "CLIPVisionConfig", _VISION, _image),
    "wav2vec2": Family(
        "Wav2Vec2Model",
        "Wav2Vec2Config",
        {**_PLAIN, **_WAV, "vocab_size": 12, "initializer_range": _WIDE},
        lambda: {"input_values": _random(2, 300)},
    ),
    "whisper encoder": Family(
        "WhisperModel",
        "WhisperConfig",
        _WHISPER,
        lambda: {"input_features": _random(2, 8, 2 * LENGTH)},
        part="encoder",
    ),
}
ROTARY = {
    "gpt_neox": Family("GPTNeoXForCausalLM", "GPTNeoXConfig", {**_TEXT, **TOKENS}, _padded, rotary=True),
    "llama": Family("LlamaForCausalLM", "LlamaConfig", _GROUPED, _padded, rotary=True),
    "mistral": Family(
        "MistralForCausalLM", "MistralConfig", {**_GROUPED, "sliding_window": None}, _padded, rotary=True
    ),
    "qwen2": Family("Qwen2ForCausalLM", "Qwen2Config", _GROUPED, _padded, rotary=True),
    "qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", {**_GROUPED, "head_dim": 12}, _padded, rotary=True),
    "gemma": Family(
        "GemmaForCausalLM", "GemmaConfig", {**_GROUPED, "num_key_value_heads": 1, "head_dim": 16}, _padded, rotary=True
    ),
    "phi3": Family("Phi3ForCausalLM", "Phi3Config", _GROUPED, _padded, rotary=True),
    "smollm3": Family(  # its second layer has no positions
        "SmolLM3ForCausalLM", "SmolLM3Config", {**_GROUPED, "no_rope_layers": [1, 0]}, _padded, rotary=True
    ),
}
DECODERS = {
    "gpt2": Family(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 36, "n_head": 3, "n_layer": 2, "n_positions": 256, "vocab_size": VOCABULARY, **TOKENS}
        | {"initializer_range": _WIDE, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        _padded,
    ),
    "opt": Family(
        "OPTForCausalLM",
        "OPTConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "init_std": _WIDE}
        | {"word_embed_proj_dim": 32, "vocab_size": VOCABULARY, "max_position_embeddings": 256, "dropout": 0.0}
        | TOKENS,
        _padded_ids,
    ),
    **ROTARY,
}
FAMILIES = {**ENCODERS, **DECODERS}


def bart() -> nn.Module:
    """An encoder and a decoder with cross-attention, one layer each; takes `bart_inputs`."""
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4}
    sizes |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": VOCABULARY}
    sizes |= {"max_position_embeddings": 128, "init_std": _WIDE, "dropout": 0.0, "decoder_start_token_id": 1}
    torch.manual_seed(0)
    config = transformers.BartConfig(**sizes, **TOKENS, forced_eos_token_id=None)
    return transformers.BartForConditionalGeneration(config).eval()


def bart_inputs() -> dict[str, Tensor]:
    return {**_padded_ids(), "decoder_input_ids": tokens(length=29, seed=1)}


def t5() -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": VOCABULARY}
    return transformers.T5EncoderModel(transformers.T5Config(**sizes)).eval()
