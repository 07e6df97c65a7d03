"""Layers: modules with parameters and buffers that call the operators of `longvq_layers.ops`."""

from longvq_layers.layers.attention.codebook_attention import CodebookAttention
from longvq_layers.layers.attention.cross import CrossAttention
from longvq_layers.layers.attention.dense import DenseAttention
from longvq_layers.layers.attention.local import LocalAttention
from longvq_layers.layers.attention.vq import VQAttention
from longvq_layers.layers.blocks.longvq import LongVQBlock
from longvq_layers.layers.blocks.mega import MegaBlock
from longvq_layers.layers.blocks.spade import SPADEBlock
from longvq_layers.layers.codebook.codebook import Codebook
from longvq_layers.layers.commitment import commitment_loss
from longvq_layers.layers.optim import optimizer_groups
from longvq_layers.layers.ssm.diagonal import DiagonalSSM
from longvq_layers.layers.ssm.ema import DampedEMA
from longvq_layers.layers.ssm.s4d import S4DLayer
from longvq_layers.layers.streaming.states import LocalAttentionState, LongVQState, MegaState, SPADEState

__all__ = [
    "Codebook",
    "CodebookAttention",
    "CrossAttention",
    "DampedEMA",
    "DenseAttention",
    "DiagonalSSM",
    "LocalAttention",
    "LocalAttentionState",
    "LongVQBlock",
    "LongVQState",
    "MegaBlock",
    "MegaState",
    "S4DLayer",
    "SPADEBlock",
    "SPADEState",
    "VQAttention",
    "commitment_loss",
    "optimizer_groups",
]
