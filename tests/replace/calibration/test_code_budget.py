"""balance_codes: layers get codes where these help most, and the total stays the same."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longvq_layers.replace import load_replaced, replace_attention
from longvq_layers.replace.calibration.code_budget import error_exponent, share_out
from tests.replace.models import bert, output, tokens

LAYERS = st.lists(st.tuples(st.floats(0, 10), st.floats(0.05, 2), st.integers(1, 8)), min_size=1, max_size=12)


@given(LAYERS, st.integers(1, 600))
def test_the_total_is_kept_and_no_exchange_would_help(layers, num_codes):
    errors, falls, heads = (list(column) for column in zip(*layers, strict=True))
    codes = share_out(errors, falls, heads, num_codes)
    assert all(max(1, num_codes // 4) <= c <= 4 * num_codes for c in codes)
    if num_codes >= 8:
        assert sum(c * h for c, h in zip(codes, heads, strict=True)) <= num_codes * sum(heads)
    if num_codes % 8 == 0 and len(set(heads)) == 1:
        assert sum(codes) == num_codes * len(codes)

        def error(layer, amount):
            return errors[layer] * (amount / num_codes) ** -falls[layer]

        share = num_codes // 8
        for giver, taker in ((g, t) for g in range(len(codes)) for t in range(len(codes)) if g != t):
            if codes[giver] > num_codes // 4 and codes[taker] < 4 * num_codes:
                loss = error(giver, codes[giver] - share) - error(giver, codes[giver])
                gain = error(taker, codes[taker]) - error(taker, codes[taker] + share)
                assert gain <= loss + 1e-9


def test_equal_layers_share_equally_and_bad_ones_get_more():
    assert share_out([0.3] * 4, [0.5] * 4, [2] * 4, 64) == [64] * 4
    few, many = share_out([0.1, 0.9], [0.5, 0.5], [4, 4], 64)
    assert few < 64 < many and few + many == 128


def test_the_exponent_of_an_error_is_measured_on_keys():
    generator = torch.Generator().manual_seed(0)
    line, cube = torch.rand(1, 4000, 1), torch.rand(1, 4000, 3)  # squared errors fall as S^-2/D
    assert error_exponent(line, 64, generator) == pytest.approx(2.0, abs=0.3)
    assert error_exponent(cube, 64, generator) == pytest.approx(2 / 3, abs=0.2)
    assert error_exponent(torch.zeros(1, 50, 2), 8, generator) == 0.05


def test_a_model_with_layers_of_different_codes():
    model, ids = bert(), tokens(4, 60)
    model.encoder.layer[0].attention.self.key.weight.data.zero_()  # all of its keys are equal, so codes lose nothing
    report = replace_attention(model, num_codes=16, window=2, calibration=[ids], balance_codes=True)
    few, many = (layer.num_codes for layer in report.replaced)
    assert (few, many) == (4, 28)
    assert [layer.attention.self.longvq.num_codes for layer in model.encoder.layer] == [few, many]
    fresh = bert()
    loaded = load_replaced(fresh, model.state_dict())
    assert [layer.num_codes for layer in loaded.replaced] == [few, many]
    assert torch.equal(output(fresh, ids), output(model, ids))


def test_balanced_codes_need_calibration():
    with pytest.raises(ValueError, match="balance_codes must be False without calibration, got True"):
        replace_attention(bert().train(), balance_codes=True)
    with pytest.raises(TypeError, match="balance_codes must be a bool, got 1"):
        replace_attention(bert(), balance_codes=1, calibration=[tokens()])
