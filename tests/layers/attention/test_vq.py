"""VQAttention, CodebookAttention, LongVQBlock and the commitment loss: the equations themselves."""

import copy

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
    commitment_loss,
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


def test_with_a_code_per_key_it_is_ordinary_attention():
    layer = VQAttention(8, 2, num_codes=40, window=0, dtype=torch.float64)
    x = torch.randn(1, 30, 8, dtype=torch.float64)
    layer(x)
    layer.eval()
    q, k, v = (p(x).view(1, 30, 2, 4).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    expected = layer.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, 30, 8))
    assert_close(layer(x), expected, "output", torch.float32)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("causal", [True, False])
def test_longvq_equals_the_definition(norm, causal):
    block = LongVQBlock(6, num_heads=2, num_codes=5, window=3, d_state=4, norm=norm, causal=causal).double()
    block(torch.randn(2, 30, 6, dtype=torch.float64))
    for parameter in block.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    block.eval()
    x = torch.randn(2, 20, 6, dtype=torch.float64)
    silu, heads = F.silu, lambda t: t.view(2, 20, 2, -1).transpose(1, 2)
    inner = block.norm1(x) if norm == "pre" else x
    z = silu(block.ssm(inner))
    q, k = z @ block.q_proj.weight.T + block.q_proj.bias, z @ block.k_proj.weight.T + block.k_proj.bias
    attention_gate = silu(z @ block.attention_gate.weight.T + block.attention_gate.bias)
    v = silu(inner @ block.v_proj.weight.T + block.v_proj.bias)
    out = ops.vq_attention(
        heads(q),
        heads(k),
        heads(v),
        block.codebook.embedding,
        causal=causal,
        window=3,
        bias=block.attention.window_bias,
        backend="reference",
    )
    out = out.transpose(1, 2).reshape(2, 20, 6)
    u = silu(
        inner @ block.candidate_x.weight.T
        + (attention_gate * out) @ block.candidate_o.weight.T
        + block.candidate_x.bias
    )
    gate = torch.sigmoid(z @ block.output_gate.weight.T + block.output_gate.bias)
    y = gate * u + (1 - gate) * x
    expected = (
        y + block.ffn(block.norm2(y)) if norm == "pre" else block.norm2(block.norm1(y) + block.ffn(block.norm1(y)))
    )
    assert_close(block(x), expected, "output")


def test_longvq_default_widths_fit_the_heads():
    block = LongVQBlock(10, num_heads=4)
    assert (block.d_attn, block.d_value, block.d_ff) == (8, 12, 20)
    assert block(torch.randn(1, 5, 10)).shape == (1, 5, 10)


def test_dropout_is_on_the_output_and_only_in_training():
    layer = VQAttention(64, 2, num_codes=4, dropout=0.5)
    x = torch.randn(2, 30, 64)
    assert 0.4 < (layer(x) == 0).double().mean() < 0.6
    assert (layer.eval()(x) != 0).all()


def test_commitment_loss_is_the_mean_squared_distance_of_real_keys():
    attention = CodebookAttention(2, 2, 3, num_codes=4, window=2, commitment=0.25)
    k = torch.randn(2, 2, 20, 3, requires_grad=True)
    mask = torch.zeros(2, 20, dtype=torch.bool)
    mask[0, 5:] = True
    for _ in range(3):
        codes, _ = copy.deepcopy(attention.codebook).quantize(k, mask)
        table = attention.codebook.embedding.clone()
        attention(k.detach(), k, k.detach(), mask)
    table = attention.codebook.embedding
    nearest = torch.stack([table[h][codes[:, h]] for h in range(2)], 1)
    distance = (k - nearest).square().sum(-1)[(~mask)[:, None].expand(2, 2, 20)]
    assert_close(commitment_loss(attention), 0.25 * distance.mean(), "loss")
    (gradient,) = torch.autograd.grad(commitment_loss(attention), k)
    expected = 0.25 * 2 * (k - nearest) / distance.numel()
    assert_close(gradient, expected.masked_fill(mask[:, None, :, None], 0), "gradient")


def test_commitment_loss_counts_every_module_once():
    shared = VQAttention(8, 2, num_codes=4, commitment=1.0)
    model = nn.ModuleList([shared, nn.ModuleList([shared]), LongVQBlock(8, num_codes=4, d_state=4), S4DLayer(8)])
    assert commitment_loss(model) == 0
    x = torch.randn(2, 20, 8)
    shared(x), model[2](x)
    parts = shared.attention.last_commitment, model[2].attention.last_commitment
    assert all(part > 0 for part in parts)
    assert commitment_loss(model) == parts[0] + parts[1]
    model.eval()
    assert commitment_loss(model) == 0
    shared(x)
    assert shared.attention.last_commitment is None
    assert commitment_loss(nn.Linear(2, 2)) == 0
    assert commitment_loss(nn.Identity()).shape == ()
    assert commitment_loss(nn.Linear(2, 2, device="meta")).device.type == "meta"
    assert commitment_loss(VQAttention(8, 2, commitment=0.0)) == 0


def test_all_masked_batch_has_zero_commitment_and_output():
    layer = VQAttention(8, 2, num_codes=4)
    y = layer(torch.randn(2, 9, 8), torch.ones(2, 9, dtype=torch.bool))
    assert (y == 0).all() and commitment_loss(layer) == 0
    y.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


def test_a_block_learns():
    # Copy the token that stood 12 places before: needs more than the window of 2.
    block = LongVQBlock(16, num_codes=16, window=2, d_state=16, causal=True)
    embed, head = nn.Embedding(6, 16), nn.Linear(16, 6)
    model = nn.ModuleList([embed, block, head])
    optimizer = torch.optim.AdamW(optimizer_groups(model, lr=1e-2, weight_decay=0.0, ssm_lr=1e-2))
    losses = []
    for _ in range(120):
        tokens = torch.randint(6, (8, 1, 12)).expand(-1, 2, -1).reshape(8, 24)
        loss = F.cross_entropy(head(block(embed(tokens)))[:, 12:].flatten(0, 1), tokens[:, 12:].roll(-1, 1).flatten())
        optimizer.zero_grad()
        (loss + commitment_loss(model)).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.6 and sum(losses[-10:]) / 10 < 1.4, losses[-10:]


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


def test_commitment_of_the_wrong_type_is_named():
    with pytest.raises(TypeError, match="commitment must be a number, got 'a'"):
        VQAttention(16, 4, commitment="a")
    with pytest.raises(TypeError, match=r"commitment_loss: model must be a torch.nn.Module, got int"):
        commitment_loss(1)
