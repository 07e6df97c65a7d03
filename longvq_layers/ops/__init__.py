"""Functional operators: vector-quantised attention, state space scan, long convolution."""

from longvq_layers.ops.ssm import long_conv, ssm_kernel, ssm_scan, ssm_step
from longvq_layers.ops.vq import vq_assign, vq_attention
from longvq_layers.ops.vq_state import VQAttentionState, vq_attention_state
from longvq_layers.ops.vq_step import vq_attention_step

__all__ = [
    "VQAttentionState",
    "long_conv",
    "ssm_kernel",
    "ssm_scan",
    "ssm_step",
    "vq_assign",
    "vq_attention",
    "vq_attention_state",
    "vq_attention_step",
]
