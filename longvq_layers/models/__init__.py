"""Small models made of the blocks, in plain PyTorch; `models.huggingface` has them for transformers."""

from longvq_layers.layers.blocks.s4d import S4DBlock
from longvq_layers.layers.blocks.transformer import TransformerBlock
from longvq_layers.layers.streaming.states import BackboneState
from longvq_layers.models.backbone import BLOCKS, SequenceBackbone
from longvq_layers.models.sequence import SequenceClassifier, SequenceEncoder, SequenceLM

__all__ = [
    "BLOCKS",
    "BackboneState",
    "S4DBlock",
    "SequenceBackbone",
    "SequenceClassifier",
    "SequenceEncoder",
    "SequenceLM",
    "TransformerBlock",
]
