"""Tiny models of real classes, and inputs for them. Sizes are odd where a class allows it."""

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

VOCABULARY = 101
COARSE = {"num_codes": 8, "window": 5}  # far from the original attention, so that a mistake shows
FINE = {"num_codes": 96, "window": 64}  # every key has a code of its own
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def bert_config(**changes) -> BertConfig:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"vocab_size": VOCABULARY, "max_position_embeddings": 4096, "initializer_range": 0.3, "pad_token_id": 0}
    return BertConfig(**sizes, **changes)


def bert(**changes) -> BertModel:
    return BertModel(bert_config(**changes)).eval()


def gpt2(**changes) -> GPT2LMHeadModel:
    sizes = {"n_embd": 36, "n_head": 3, "n_layer": 2, "n_positions": 4096, "vocab_size": VOCABULARY}
    return GPT2LMHeadModel(GPT2Config(**sizes, **TOKENS, initializer_range=0.3, **changes)).eval()


def llama(**changes) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    sizes |= {"num_hidden_layers": 2, "vocab_size": VOCABULARY, "initializer_range": 0.3}
    return LlamaForCausalLM(LlamaConfig(**sizes, **TOKENS, **changes)).eval()


FAMILIES = {"bert": bert, "gpt2": gpt2, "llama": llama}
CAUSAL = {"gpt2": gpt2, "llama": llama}


def encoder(**changes) -> nn.TransformerEncoder:
    options = {"dim_feedforward": 48, "batch_first": True, "dropout": 0.0, **changes}
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, **options), 2, enable_nested_tensor=True).eval()


def tokens(batch: int = 2, length: int = 37, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(side: str, batch: int = 2, length: int = 37, padding: int = 9) -> dict[str, Tensor]:
    """Inputs whose last row is padded on one side."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, slice(-padding, None) if side == "right" else slice(0, padding)] = 0
    ids = tokens(batch, length) * mask
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def output(model: nn.Module, *args, **kwargs) -> Tensor:
    """The first output, without gradients: last hidden state or logits."""
    with torch.no_grad():
        return model(*args, **kwargs)[0]


def snapshot(model: nn.Module) -> list:
    """Everything that a failed replacement could change in a model."""

    def state(module: nn.Module) -> list:
        inside = [sorted(module.__dict__), sorted(module._modules), sorted(module._buffers)]
        hooks = [list(module._forward_hooks), list(module._forward_pre_hooks)]
        return [id(module), type(module), module.training, id(module.__dict__.get("config")), *inside, *hooks]

    return [*(state(module) for module in model.modules()), torch.get_rng_state().tolist()]
