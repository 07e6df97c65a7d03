"""Swap the attention of an existing model for linear-time vector-quantised attention, and put it back."""

from longvq_layers.replace.adapters.custom.adapter import register_adapter
from longvq_layers.replace.adapters.huggingface.register import register_attn_implementation
from longvq_layers.replace.api import replace_attention
from longvq_layers.replace.distill.api import distill_attention
from longvq_layers.replace.distill.report import DistillPoint, DistillReport
from longvq_layers.replace.install import restore_attention
from longvq_layers.replace.load import load_replaced
from longvq_layers.replace.report import LayerReport, ReplacementReport

__all__ = [
    "DistillPoint",
    "DistillReport",
    "LayerReport",
    "ReplacementReport",
    "distill_attention",
    "load_replaced",
    "register_adapter",
    "register_attn_implementation",
    "replace_attention",
    "restore_attention",
]
