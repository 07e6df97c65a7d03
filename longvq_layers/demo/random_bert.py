"""A BERT of random weights, with its own attention and with ours, and its inputs."""

import copy
import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from longvq_layers.demo.settings import SpeedSettings
from longvq_layers.replace import replace_attention

_VOCABULARY = 1000


def build(settings: SpeedSettings) -> tuple[nn.Module, nn.Module]:
    """The same model twice: with its own attention, and with ours calibrated on random tokens."""
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "vocab_size": _VOCABULARY,
        "hidden_size": settings.hidden,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "intermediate_size": 4 * settings.hidden,
        "max_position_embeddings": max(*settings.lengths, settings.calibration_tokens),
        "attn_implementation": "sdpa",
    }
    config = BertConfig(**options)
    own = BertModel(config, add_pooling_layer=False).eval()
    ours = copy.deepcopy(own)
    calibration = [tokens(settings.calibration_tokens)]
    replace_attention(ours, num_codes=settings.num_codes, window=settings.window, calibration=calibration)
    return own, ours


def tokens(length: int) -> Tensor:
    """(1, length) random token ids, the same on every call."""
    return torch.randint(_VOCABULARY, (1, length), generator=torch.Generator().manual_seed(length))
