"""Functional operators: vector-quantised attention, state space scan, long convolution."""

from longvq_layers.ops.ssm import long_conv, ssm_kernel, ssm_scan, ssm_step
from longvq_layers.ops.vq import vq_assign, vq_attention

__all__ = ["long_conv", "ssm_kernel", "ssm_scan", "ssm_step", "vq_assign", "vq_attention"]
