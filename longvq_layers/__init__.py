"""Drop-in layers for long sequences: vector-quantised attention and state space models in linear time.

>>> import torch, longvq_layers
>>> layer = longvq_layers.VQAttention(64, num_heads=4)
>>> layer(torch.randn(2, 1000, 64)).shape
torch.Size([2, 1000, 64])
"""

from longvq_layers import _extension, ops
from longvq_layers.layers import (
    Codebook,
    LongVQBlock,
    MegaBlock,
    S4DLayer,
    SPADEBlock,
    VQAttention,
    commitment_loss,
    optimizer_groups,
)
from longvq_layers.replace import replace_attention, restore_attention

_extension.load()
_extension.load_cuda()

__version__ = "0.1.0"

__all__ = [
    "Codebook",
    "LongVQBlock",
    "MegaBlock",
    "S4DLayer",
    "SPADEBlock",
    "VQAttention",
    "commitment_loss",
    "ops",
    "optimizer_groups",
    "replace_attention",
    "restore_attention",
]
