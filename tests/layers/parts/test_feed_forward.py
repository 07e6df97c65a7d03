"""The feed-forward block and its dropout."""

import pytest
import torch
from torch.nn import functional as F

from longvq_layers.layers.parts.dropout import FeatureDropout, make_dropout
from longvq_layers.layers.parts.feed_forward import FeedForward
from tests.tolerances import assert_close


@pytest.mark.parametrize("glu", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
def test_equals_its_equation(glu, activation):
    ffn = FeedForward(5, 7, activation=activation, glu=glu, dtype=torch.float64)
    x = torch.randn(2, 9, 5, dtype=torch.float64)
    act = getattr(F, activation)
    hidden = act(x @ ffn.up.weight[:7].T + ffn.up.bias[:7])
    if glu:
        hidden = hidden * (x @ ffn.up.weight[7:].T + ffn.up.bias[7:])
    assert_close(ffn(x), hidden @ ffn.down.weight.T + ffn.down.bias, "y")
    assert ffn(x[:, 0]).shape == (2, 5) and ffn(x[:, :0]).shape == (2, 0, 5)


def test_each_dropout_is_in_its_place():
    x = torch.randn(2, 50, 64)
    last = FeedForward(64, 128, dropout=0.5, hidden_dropout=0.0)
    assert 0.4 < (last(x) == 0).double().mean() < 0.6  # of the output
    inner = FeedForward(64, 128, dropout=0.0, hidden_dropout=0.5)
    seen = []
    inner.down.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    assert (inner(x) != 0).all()
    assert 0.4 < (seen[0] == 0).double().mean() < 0.6
    assert FeedForward(4, 8, dropout=0.25).hidden_dropout.p == 0.25
    for ffn in (last.eval(), inner.eval()):
        assert torch.equal(ffn(x), ffn(x)) and (ffn(x) != 0).all()


def test_feature_dropout_drops_channels_of_a_sequence():
    drop, x = FeatureDropout(0.25), torch.ones(40, 9, 50)
    y = drop(x)
    assert (y == y[:, :1]).all()  # equal at all positions
    assert y.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert 0.2 < (y == 0).double().mean() < 0.3
    assert not torch.equal(y[0], y[1])  # sequences drop different channels
    assert torch.equal(drop.eval()(x), x) and torch.equal(FeatureDropout(0.0)(x), x)


def test_options_are_checked_and_shown():
    for options, text in (
        ({"activation": "tanh"}, "activation must be one of 'silu', 'gelu', 'relu', got 'tanh'"),
        ({"dropout": 1.0}, r"dropout must be at least 0 and below 1, got 1\.0"),
        ({"hidden_dropout": -1.0}, r"hidden_dropout must be at least 0 and below 1, got -1\.0"),
        ({"dropout_type": "row"}, "dropout_type must be one of 'element', 'feature', got 'row'"),
    ):
        with pytest.raises(ValueError, match=f"FeedForward: {text}"):
            FeedForward(4, 8, **options)
    with pytest.raises(ValueError, match="d_ff must be at least 1, got 0"):
        FeedForward(4, 0)
    with pytest.raises(ValueError, match="Block: dropout_type must be one of"):
        make_dropout("Block", "row", 0.1)
    ffn = FeedForward(4, 8, activation="gelu", glu=True, dropout=0.1, hidden_dropout=0.2, dropout_type="feature")
    assert repr(eval(f"FeedForward({ffn.extra_repr()})")) == repr(ffn)
