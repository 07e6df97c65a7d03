"""Swap the attention of an existing model for linear-time vector-quantised attention, and put it back."""

from longvq_layers.replace.api import replace_attention
from longvq_layers.replace.custom import register_adapter
from longvq_layers.replace.distill import distill_attention
from longvq_layers.replace.distill_report import DistillPoint, DistillReport
from longvq_layers.replace.huggingface_by_name import register_attn_implementation
from longvq_layers.replace.installation import restore_attention
from longvq_layers.replace.report import LayerReport, ReplacementReport
from longvq_layers.replace.saved import load_replaced

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
