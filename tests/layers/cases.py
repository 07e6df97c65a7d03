"""Small instances of every layer, for tests of what all layers promise."""

from collections.abc import Callable

import torch
from torch import nn

from longvq_layers.layers import (
    DampedEMA,
    DiagonalSSM,
    LocalAttention,
    LongVQBlock,
    MegaBlock,
    S4DLayer,
    SPADEBlock,
    VQAttention,
)

WIDTH = 16


def _vq(**options) -> nn.Module:
    return VQAttention(WIDTH, 4, num_kv_heads=2, num_codes=6, window=3, **options)


def _vq_exact(**options) -> nn.Module:
    return VQAttention(WIDTH, 2, num_codes=6, window=3, local_keys="exact", activation="laplace", **options)


def _ssm(**options) -> nn.Module:
    return DiagonalSSM(WIDTH, d_state=8, **options)


def _ema(**options) -> nn.Module:
    return DampedEMA(WIDTH, ndim=4, **options)


def _s4d(**options) -> nn.Module:
    return S4DLayer(WIDTH, d_state=8, discretization="bilinear", init="inv", **options)


def _longvq(**options) -> nn.Module:
    return LongVQBlock(WIDTH, num_codes=6, window=3, d_state=8, **options)


def _longvq_post(**options) -> nn.Module:
    return LongVQBlock(WIDTH, num_heads=2, num_codes=6, window=3, d_state=8, norm="post", **options)


def _longvq_rms_glu_ema(**options) -> nn.Module:
    widths = {"ema_dim": 4, "d_attn": 6, "d_value": 20, "d_ff": 24}
    return LongVQBlock(WIDTH, num_codes=6, window=3, ssm="ema", norm_type="rms", glu=True, **widths, **options)


def _longvq_post_scale(**options) -> nn.Module:
    kinds = {"norm": "post", "norm_type": "scale", "activation": "laplace", "ffn_activation": "gelu"}
    return LongVQBlock(WIDTH, num_codes=6, window=3, window_bias=False, d_state=8, ssm_gate=False, **kinds, **options)


def _longvq_dense_batch(**options) -> nn.Module:
    return LongVQBlock(WIDTH, num_codes=None, window=3, d_state=8, d_ff=0, norm_type="batch", **options)


def _mega(**options) -> nn.Module:
    return MegaBlock(WIDTH, ema_dim=4, chunk=4, **options)


def _mega_full(**options) -> nn.Module:
    switches = {"activation": "laplace", "rel_pos_bias": "simple", "norm": "post", "norm_type": "rms"}
    return MegaBlock(WIDTH, ema_dim=4, max_positions=64, **switches, **options)


BARE = ("ssm", "ema")  # layers without projections: their input is called u and may have any floating dtype


def _local(**options) -> nn.Module:
    # The window is as wide as most test sequences, because the tests check that all positions are seen.
    return LocalAttention(WIDTH, 4, num_kv_heads=2, window=20, **options)


def _spade(**options) -> nn.Module:
    return SPADEBlock(WIDTH, 4, window=3, d_state=8, **options)


def _spade_add(**options) -> nn.Module:
    return SPADEBlock(WIDTH, 2, combine="add", window=3, d_state=8, norm="post", glu=True, **options)


def _spade_stack(**options) -> nn.Module:
    return SPADEBlock(WIDTH, 2, combine="stack", window=3, d_state=8, norm_type="rms", **options)


def _spade_upper(**options) -> nn.Module:
    return SPADEBlock(WIDTH, 2, global_ssm=False, window=20, **options)


LAYERS: dict[str, Callable[..., nn.Module]] = {
    "vq": _vq,
    "vq_exact": _vq_exact,
    "ssm": _ssm,
    "ema": _ema,
    "s4d": _s4d,
    "longvq": _longvq,
    "longvq_post": _longvq_post,
    "longvq_rms_glu_ema": _longvq_rms_glu_ema,
    "longvq_post_scale": _longvq_post_scale,
    "longvq_dense_batch": _longvq_dense_batch,
    "mega": _mega,
    "mega_full": _mega_full,
    "local": _local,
    "spade": _spade,
    "spade_add": _spade_add,
    "spade_stack": _spade_stack,
    "spade_upper": _spade_upper,
}


def trained(name: str, **options) -> nn.Module:
    """A layer in eval mode with a trained codebook and a random window bias."""
    layer = LAYERS[name](**options)
    for parameter_name, parameter in layer.named_parameters():
        if parameter_name.endswith("window_bias"):
            nn.init.normal_(parameter)
    for _ in range(2):
        layer(torch.randn(3, 40, WIDTH, dtype=options.get("dtype")))
    return layer.eval()
