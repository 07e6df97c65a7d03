"""Functional operators: :func:`vq_assign`, :func:`vq_attention`, :func:`ssm_scan`, :func:`ssm_kernel`, :func:`long_conv`."""

from longvq_layers.ops.ssm import long_conv, ssm_kernel, ssm_scan
from longvq_layers.ops.vq import vq_assign, vq_attention

__all__ = ["long_conv", "ssm_kernel", "ssm_scan", "vq_assign", "vq_attention"]
