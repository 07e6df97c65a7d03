"""VQAttention and CodebookAttention: the equations, dropout, and errors that name the argument."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from longvq_layers import ops
from longvq_layers.layers import (
    CodebookAttention,
    LongVQBlock,
    S4DLayer,
    VQAttention,
    optimizer_groups,
)
from tests.tolerances import assert_close


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("activation", ["softmax", "laplace"])
def test_attention_equals_the_definition(causal, activation):
    layer = VQAttention(12, 4, num_kv_heads=2, num_codes=5, window=3, causal=causal, activation=activation)
    layer.double()(torch.randn(2, 30, 12, dtype=torch.float64))
    nn.init.normal_(layer.attention.window_bias)
    layer.eval()
    x = torch.randn(2, 20, 12, dtype=torch.float64)
    q, k, v = (
        F.linear(x, p.weight, p.bias).view(2, 20, -1, 3).transpose(1, 2)
        for p in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    out = ops.vq_attention(
        q,
        k,
        v,
        layer.codebook.embedding,
        causal=causal,
        window=3,
        bias=layer.attention.window_bias,
        activation=activation,
        backend="reference",
    )
    expected = F.linear(out.transpose(1, 2).reshape(2, 20, 12), layer.out_proj.weight, layer.out_proj.bias)
    assert_close(layer(x), expected, "output")


def test_a_code_per_key_gives_ordinary_attention():
    layer = VQAttention(8, 2, num_codes=40, window=0, dtype=torch.float64)
    x = torch.randn(1, 30, 8, dtype=torch.float64)
    layer(x)
    layer.eval()
    q, k, v = (p(x).view(1, 30, 2, 4).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    expected = layer.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, 30, 8))
    assert_close(layer(x), expected, "output", torch.float32)


def test_dropout_is_on_the_output_and_only_in_training():
    layer = VQAttention(64, 2, num_codes=4, dropout=0.5)
    x = torch.randn(2, 30, 64)
    assert 0.4 < (layer(x) == 0).double().mean() < 0.6
    assert (layer.eval()(x) != 0).all()


def test_window_bias_shapes():
    assert CodebookAttention(3, 1, 4, window=5, causal=True).window_bias.shape == (3, 5)
    assert CodebookAttention(3, 1, 4, window=5).window_bias.shape == (3, 9)
    assert CodebookAttention(3, 1, 4, window=0).window_bias is None
    assert CodebookAttention(3, 1, 4, window=5, window_bias=False).window_bias is None
    names = [g["name"] for g in optimizer_groups(CodebookAttention(3, 1, 4), lr=1.0, weight_decay=1.0)]
    assert names == ["no_decay"]


def test_wrong_arguments_are_named():
    for options, text in (
        ({"num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads, got 4 and 3"),
        ({"num_codes": 0}, "num_codes must be at least 1, got 0"),
        ({"window": -1}, r"window must be 0 \(none\) or more positions, got -1"),
        ({"dropout": -0.1}, r"dropout must be at least 0 and below 1, got -0\.1"),
        ({"local_keys": "near"}, "local_keys must be one of 'quantized', 'exact', got 'near'"),
        ({"key_grad": "full"}, "key_grad must be one of 'cluster', 'window', got 'full'"),
        ({"activation": "relu"}, "activation must be one of 'softmax', 'laplace', got 'relu'"),
        ({"commitment": -1.0}, r"commitment must be a finite number, at least 0, got -1\.0"),
        ({"backend": "gpu"}, "backend must be one of"),
    ):
        with pytest.raises(ValueError, match=text):
            VQAttention(16, 4, **options)
    with pytest.raises(ValueError, match="embed_dim must be a multiple of num_heads, got 10 and 4"):
        VQAttention(10, 4)
    with pytest.raises(TypeError, match="window must be an int, in positions, got float"):
        VQAttention(8, 4, window=2.0)
    with pytest.raises(ValueError, match="d_attn must be a multiple of num_heads, got 9 and 2"):
        LongVQBlock(8, num_heads=2, d_attn=9)
    with pytest.raises(ValueError, match="norm must be one of 'pre', 'post', got 'none'"):
        LongVQBlock(8, norm="none")
    attention = CodebookAttention(2, 1, 4)
    q, k = torch.randn(1, 2, 5, 4), torch.randn(1, 1, 5, 4)
    with pytest.raises(ValueError, match=r"q must have shape \(B, H, L, D\) = \(1, 2, 5, 4\), got \(1, 3, 5, 4\)"):
        attention(torch.randn(1, 3, 5, 4), k, k)
    with pytest.raises(TypeError, match="k must have the dtype of q"):
        attention(q, k.double(), k)


@pytest.mark.parametrize("layer", [VQAttention, LongVQBlock, S4DLayer])
def test_arguments_of_the_wrong_type_are_named(layer):
    arguments = (16, 4) if layer is VQAttention else (16,)
    with pytest.raises(TypeError, match=r"dtype must be a floating torch dtype, got torch\.int32"):
        layer(*arguments, dtype=torch.int32)
    with pytest.raises(TypeError, match=r"dropout must be a number, got '0\.1'"):
        layer(*arguments, dropout="0.1")
