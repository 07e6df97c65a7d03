"""CrossAttention against torch.nn.MultiheadAttention, masked and empty memories, and errors."""

import itertools

import pytest
import torch

from longvq_layers.layers import CrossAttention
from tests.tolerances import assert_close


def pair():
    layer, other = (
        CrossAttention(8, 2, dtype=torch.float64),
        torch.nn.MultiheadAttention(8, 2, batch_first=True).double(),
    )
    projections = (layer.q_proj, layer.k_proj, layer.v_proj)
    with torch.no_grad():
        other.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        other.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
        other.out_proj.load_state_dict(layer.out_proj.state_dict())
    return layer, other


@pytest.mark.parametrize("masked", [False, True])
def test_equals_multihead_attention_with_gradients(masked):
    layer, other = pair()
    x, memory = torch.randn(3, 7, 8).double().requires_grad_(), torch.randn(3, 11, 8).double().requires_grad_()
    mask = torch.rand(3, 11) < 0.4 if masked else None
    y = layer(x, memory, mask)
    expected = other(x, memory, memory, key_padding_mask=mask, need_weights=False)[0]
    assert_close(y, expected, "y")
    onto = torch.randn_like(y)
    for a, b in zip(*(torch.autograd.grad((out * onto).sum(), (x, memory)) for out in (y, expected)), strict=True):
        assert_close(a, b, "gradient")


def test_a_fully_masked_or_empty_memory_counts_as_zero():
    layer = CrossAttention(8, 2)
    x, memory = torch.randn(2, 5, 8), torch.randn(2, 4, 8, requires_grad=True)
    mask = torch.zeros(2, 4, dtype=torch.bool)
    mask[0] = True
    y = layer(x, memory.masked_fill(mask.unsqueeze(-1), torch.nan), mask)
    y.sum().backward()
    assert_close(y[0], layer.out_proj.bias.expand(5, 8), "y")
    assert (memory.grad[0] == 0).all() and memory.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    assert_close(y[1], layer(x[1:], memory[1:])[0], "the other row")
    assert_close(layer(x, memory[:, :0]), layer.out_proj.bias.expand(2, 5, 8), "empty memory")
    assert layer(x[:0], memory[:0]).shape == (0, 5, 8) and layer(x[:, :0], memory).shape == (2, 0, 8)


@pytest.mark.parametrize("masked", [False, True])
def test_each_document_attends_to_its_own_memory(masked):
    layer = CrossAttention(8, 2, dtype=torch.float64)
    cuts = torch.tensor([0, 4, 4, 9, 10], dtype=torch.int32)
    x, memory = torch.randn(1, 10, 8).double(), torch.randn(4, 6, 8).double()
    mask = torch.rand(4, 6) < 0.5 if masked else None
    padding = torch.arange(10)[None] == 5
    y = layer(x, memory, mask, key_padding_mask=padding, cu_seqlens=cuts)
    assert (y[padding] == 0).all()
    for n, (a, b) in enumerate(itertools.pairwise(cuts.tolist())):
        alone = layer(x[:, a:b], memory[n : n + 1], None if mask is None else mask[n : n + 1])
        assert_close(y[:, a:b], alone.masked_fill(padding[:, a:b, None], 0), f"document {n}")
    assert layer(x[:, :0], memory[:0], cu_seqlens=cuts[:1]).shape == (1, 0, 8)


def test_wrong_arguments_are_named():
    layer, x, memory = CrossAttention(8, 2), torch.randn(2, 5, 8), torch.randn(2, 4, 8)
    mask = torch.zeros(2, 4, dtype=torch.bool)
    for wrong, error, message in (
        ((x, None), TypeError, r"memory must be a torch\.Tensor"),
        ((x, memory[:1]), ValueError, r"memory must have shape .* = \(2, 4, 8\), got \(1, 4, 8\)"),
        ((x, memory[..., 1:]), ValueError, "memory must have shape"),
        ((x, memory.double()), TypeError, "memory must have the dtype of the layer"),
        ((x, memory, mask.float()), TypeError, "memory_key_padding_mask must be bool"),
        ((x, memory, mask[:, 1:]), ValueError, "memory_key_padding_mask must have shape"),
        ((x, memory, mask[0]), ValueError, "memory_key_padding_mask must have 2 dim"),
    ):
        with pytest.raises(error, match=message):
            layer(*wrong)
    with pytest.raises(ValueError, match="embed_dim must be a multiple of num_heads"):
        CrossAttention(8, 3)


def test_repr_reproduces_the_call():
    layer = CrossAttention(8, 2, bias=False, dropout=0.25)
    assert repr(eval(f"CrossAttention({layer.extra_repr()})")) == repr(layer)
