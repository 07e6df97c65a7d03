"""Checkpoints of the public Mega code: equal outputs, and errors that name the tensor."""

import pytest
import torch

from longvq_layers.layers import MegaBlock
from tests.layers.published import published_mega
from tests.tolerances import assert_close

WIDTH = 6


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("activation", ["softmax", "laplace", "relu2"])
@pytest.mark.parametrize("bias", ["simple", "rotary"])
@pytest.mark.parametrize("chunk", [None, 5], ids=["full", "chunks"])
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "whole"])
def test_outputs_are_equal(causal, activation, bias, chunk, padded):
    state = published_mega.random_state(causal=causal, bias=bias, positions=chunk or 16)
    block = MegaBlock.from_published(state, chunk=chunk, activation=activation).eval()
    x = torch.randn(3, 13, WIDTH, dtype=torch.float64)
    mask = torch.arange(13) >= torch.tensor([[13], [9], [4]]) if padded else None
    expected = published_mega.layer(state, x, mask, chunk=chunk, causal=causal, activation=activation)
    real = torch.ones(3, 13, dtype=torch.bool) if mask is None else ~mask
    assert_close(block(x, mask)[real], expected[real], "output")
    # Every part of the layer changes the output, so the comparison covers it.
    for name in block.state_dict():
        changed = MegaBlock.from_published(state, chunk=chunk, activation=activation).eval()
        with torch.no_grad():
            parameter = changed.state_dict(keep_vars=True)[name]
            parameter += torch.rand_like(parameter)
        assert (changed(x, mask)[real] - expected[real]).abs().max() > 1e-6, name


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("norm_type", ["layer", "rms", "scale", "batch"])
@pytest.mark.parametrize("ffn", [7, 0])
def test_norms_and_feed_forward_are_equal(norm, norm_type, ffn):
    state = published_mega.random_state(norm_type=norm_type, ffn=ffn, prefix="encoder.layers.3.")
    state["encoder.layers.30.mega_layer.gamma"] = torch.zeros(1)  # an entry of another layer
    block = MegaBlock.from_published(state, "encoder.layers.3.", norm=norm, ffn_activation="gelu").eval()
    assert (block.norm, block.norm_type, block.d_ff) == (norm, norm_type, ffn)
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64)
    own = {name.removeprefix("encoder.layers.3."): value for name, value in state.items()}
    options = {"norm_place": norm, "norm_type": norm_type, "ffn_activation": torch.nn.functional.gelu}
    assert_close(block(x), published_mega.layer(own, x, **options), "output")
    small = 1e-3 * x  # small enough for ε to matter
    assert_close(block(small), published_mega.layer(own, small, **options), "output, small input")


def test_sizes_and_dtype_follow_the_checkpoint_and_tensors_are_copied():
    state = published_mega.random_state(causal=True, bias="rotary")
    state = {name: value.to(torch.bfloat16) for name, value in state.items()}
    block = MegaBlock.from_published(state, chunk=4, dropout=0.1, attention_dropout=0.2)
    assert (block.d_model, block.d_attn, block.d_value, block.d_ff, block.ema.ndim) == (6, 4, 5, 7, 3)
    assert block.attention.causal and block.training and block.attention.dropout == 0.2 and block.dropout.p == 0.1
    assert block.v_proj.weight.dtype == torch.bfloat16 and block.ema.delta.dtype == torch.float32
    wide = MegaBlock.from_published(state, chunk=4, dtype=torch.float32)
    assert wide.v_proj.weight.dtype == torch.float32
    before = state["mega_layer.v_proj.weight"].clone()
    with torch.no_grad():
        block.v_proj.weight.zero_()
    assert torch.equal(state["mega_layer.v_proj.weight"], before)


def test_wrong_checkpoints_are_named():
    state = published_mega.random_state(prefix="l.", positions=5)
    convert = MegaBlock.from_published
    lacking = {name: value for name, value in state.items() if not name.endswith(("move.omega", "fc2.bias"))}
    with pytest.raises(
        ValueError,
        match=r"must have l\.mega_layer\.move\.omega, l\.nffn\.fc2\.bias, got none.*is prefix='l\.' right",
    ):
        convert(lacking, "l.")
    with pytest.raises(ValueError, match=r"must have mega_layer\.move\.delta.*is prefix='' right"):
        convert(state)
    with pytest.raises(ValueError, match=r"only the keys of a Mega layer, got l\.cross_attn\.gamma"):
        convert(state | {"l.cross_attn.gamma": torch.zeros(2)}, "l.")
    for key, value, error in (
        ("mega_layer.h_proj.weight", torch.zeros(6, 4), r"\(D, E\) = \(6, 5\), got \(6, 4\)"),
        ("mega_layer.move.delta", torch.zeros(12, 3), r"must have 3 dimensions \(W, N, 1\), got 2"),
        ("mega_layer.move.gamma", torch.zeros(7, 3), r"must have shape \(W, N\) = \(12, 3\), got \(7, 3\)"),
        ("mega_layer.rel_pos_bias.rel_pos_bias", torch.zeros(8), r"\(2M-1\) = \(7,\), got \(8,\)"),
        ("mega_layer.norm.norm.bias", torch.zeros(5), r"\(D\) = \(6,\), got \(5,\)"),
        ("nffn.fc1.weight", torch.zeros(8, 6), r"nffn\.fc1\.bias must have shape \(F\) = \(8,\), got \(7,\)"),
    ):
        with pytest.raises(ValueError, match=error):
            convert(state | {"l." + key: value}, "l.")
    with pytest.raises(ValueError, match=r"chunk must be 5, the positions that l\.mega_layer\.rel_pos_bias.*got 4"):
        convert(state, "l.", chunk=4)
    with pytest.raises(TypeError, match=r"l\.mega_layer\.beta must be a real floating-point tensor, got torch.int64"):
        convert(state | {"l.mega_layer.beta": torch.zeros(2, 4).long()}, "l.")
    with pytest.raises(TypeError, match="state_dict must be a mapping of names to tensors, got list"):
        convert([])
    with pytest.raises(TypeError, match="prefix must be a str, got None"):
        convert(state, None)
