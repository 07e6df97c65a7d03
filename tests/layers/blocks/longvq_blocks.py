"""Small LongVQ blocks, one for every option, for the tests of the block."""

import pytest
import torch

from longvq_layers.layers import LongVQBlock

WIDTH, LENGTH, WINDOW = 6, 15, 3

OPTIONS = {
    "default": {},
    "post": {"norm": "post"},
    "rms": {"norm_type": "rms"},
    "post_scale": {"norm": "post", "norm_type": "scale"},
    "batch": {"norm_type": "batch"},
    "ema": {"ssm": "ema", "ema_dim": 3},
    "no_ffn": {"d_ff": 0},
    "post_no_ffn": {"norm": "post", "d_ff": 0},
    "gelu_glu": {"ffn_activation": "gelu", "glu": True, "d_ff": 7},
    "relu": {"ffn_activation": "relu", "norm": "post"},
    "laplace": {"activation": "laplace"},
    "heads": {"num_heads": 2, "d_attn": 4, "d_value": 10},
    "no_bias": {"window_bias": False},
    "no_window": {"window": 0},
    "exact": {"local_keys": "exact"},
    "dense": {"num_codes": None},
    "dense_plain": {"num_codes": None, "window_bias": False, "num_heads": 2, "norm": "post"},
    "gates_of_x": {"ssm_gate": False},
    "gates_of_x_post": {"ssm_gate": False, "norm": "post"},
}
each_option = pytest.mark.parametrize("name", OPTIONS)
each_direction = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


def block_of(name: str, causal: bool) -> LongVQBlock:
    """A float64 block in eval mode whose parameters all differ from their initial values."""
    options = {"num_codes": LENGTH, "window": WINDOW, "d_state": 4, **OPTIONS[name]}
    block = LongVQBlock(WIDTH, causal=causal, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        for norm in (block.norm1, block.norm2):
            if hasattr(norm, "running_mean"):
                norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    return block.eval()
