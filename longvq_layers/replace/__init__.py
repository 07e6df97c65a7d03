"""Swap the attention of an existing model for linear-time vector-quantised attention, and put it back."""

from longvq_layers.replace.api import replace_attention, restore_attention
from longvq_layers.replace.report import LayerReport, ReplacementReport

__all__ = ["LayerReport", "ReplacementReport", "replace_attention", "restore_attention"]
