"""The commitment loss: its value and gradient, which layers count, and errors that name the argument."""

import copy

import pytest
import torch
from torch import nn

from longvq_layers.layers import CodebookAttention, LongVQBlock, S4DLayer, VQAttention, commitment_loss
from tests.tolerances import assert_close


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


def test_commitment_of_the_wrong_type_is_named():
    with pytest.raises(TypeError, match="commitment must be a number, got 'a'"):
        VQAttention(16, 4, commitment="a")
    with pytest.raises(TypeError, match=r"commitment_loss: model must be a torch.nn.Module, got int"):
        commitment_loss(1)
