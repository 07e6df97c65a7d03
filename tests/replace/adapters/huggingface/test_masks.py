"""Masks of transformers models: what they say decides about causality and padding, or they are refused."""

import pytest
import torch
from transformers import (
    Gemma3TextConfig,
    Gemma3TextModel,
)

from longvq_layers.replace import replace_attention
from tests.replace.models import COARSE, FAMILIES, FINE, TOKENS, VOCABULARY, bert, gpt2, llama, output, padded, tokens
from tests.tolerances import assert_close


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_user_made_dense_mask_is_read_or_refused(attention):
    model, ids = gpt2(attn_implementation=attention), tokens()
    replace_attention(model, **COARSE, calibration=[ids])
    expected = output(model, ids)
    causal = torch.ones(37, 37, dtype=torch.bool).tril()[None, None]
    assert_close(output(model, ids, attention_mask=causal), expected, "causal bool mask")
    additive = torch.zeros(1, 1, 37, 37).masked_fill(~causal, torch.finfo(torch.float32).min)
    assert_close(output(model, ids, attention_mask=additive), expected, "causal float mask")
    with pytest.raises(NotImplementedError, match="not exactly causal with padding"):
        output(model, ids, attention_mask=causal & ~torch.ones(37, 37, dtype=torch.bool).tril(-5))
    with pytest.raises(NotImplementedError, match="additive position bias"):
        output(model, ids, attention_mask=torch.where(causal, 0.5, -torch.inf))


def llama_that_sees_both_sides(way):
    if way == "config":
        return llama(is_causal=False)
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.is_causal = False  # decides where transformers makes no mask
    return model


def test_eager_attention_goes_by_its_masks_whatever_the_module_says():
    model, ids = llama_that_sees_both_sides("modules"), tokens()
    model.set_attn_implementation("eager")
    expected = output(model, ids)
    report = replace_attention(model, **FINE, calibration=[ids])
    assert_close(output(model, ids), expected, "eager")
    assert [layer.causal for layer in report.layers] == ["yes"] * 2


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_module_that_says_otherwise_than_its_masks(side):
    """With padding transformers makes a causal mask; without padding the module decides."""
    model, inputs, ids = llama_that_sees_both_sides("modules"), padded(side), tokens()
    ones = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = [output(model, **batch, use_cache=False) for batch in (inputs, ones)]
    report = replace_attention(model, **FINE, calibration=[inputs, ones], far_positions="rotated")
    real = inputs["attention_mask"].bool()
    assert_close(output(model, **inputs, use_cache=False)[real], expected[0][real], "with padding")
    assert_close(output(model, **ones, use_cache=False), expected[1], "without")
    assert [layer.causal for layer in report.layers] == ["per call"] * 2
    assert not any("dense" in note for layer in report.layers for note in layer.notes)


@pytest.mark.parametrize("way", ["config", "modules"])
def test_a_decoder_that_was_made_bidirectional(way):
    model, ids = llama_that_sees_both_sides(way), tokens()
    expected = output(model, ids, use_cache=False)
    report = replace_attention(model, **FINE, calibration=[ids, ids[:, :1]])  # a call of one token shows no causality
    assert_close(output(model, ids, use_cache=False), expected, way)
    assert [(layer.causal, layer.far_positions) for layer in report.layers] == [("no", "rotated")] * 2
    report.restore()
    with pytest.raises(NotImplementedError, match=r"rectified.*bidirectional"):
        replace_attention(model, **FINE, calibration=[ids], far_positions="rectified")
    assert torch.equal(output(model, ids, use_cache=False), expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_dense_mask_decides_whatever_the_module_says(attention):
    ids = tokens(2, 20)
    causal = torch.ones(20, 20, dtype=torch.bool).tril().expand(2, 1, 20, 20)
    padding = torch.arange(20) < torch.tensor([20, 12])[:, None, None, None]
    everything = torch.ones(1, 1, 20, 20, dtype=torch.bool)
    for family, mask in (
        ("bert", causal),
        ("bert", causal & padding),
        ("gpt2", padding.expand(2, 1, 20, 20)),
        ("gpt2", torch.cat([causal[:1], everything])),  # the second row is padding alone
    ):
        model = FAMILIES[family]()
        model.set_attn_implementation(attention)
        given = mask if attention == "sdpa" else torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
        expected = output(model, ids, attention_mask=given)
        replace_attention(model, **FINE, calibration=[{"input_ids": ids, "attention_mask": given}])
        real = mask[:, 0, -1] if mask[-1].float().mean() < 1 else torch.tensor([[True], [False]]).expand(2, 20)
        assert_close(output(model, ids, attention_mask=given)[real], expected[real], family)


@pytest.mark.parametrize("calibrated", [False, True])
def test_eager_attention_without_a_mask_sees_the_future(calibrated):
    model = bert(attn_implementation="eager")
    for layer in model.encoder.layer:
        layer.attention.self.is_causal = True  # some classes say so wrongly; only fused attention uses it
    module, x = model.encoder.layer[0].attention, torch.randn(2, 9, 32)
    expected = output(module, x)
    if calibrated:
        replace_attention(module, num_codes=32, window=16, calibration=[x])
    else:
        replace_attention(module.train(), num_codes=32, window=16)
        output(module, x)
    assert_close(output(module.eval(), x), expected, "sees the future")


SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
SIZES |= {"num_hidden_layers": 2, "vocab_size": VOCABULARY, **TOKENS}


def test_masks_that_are_more_than_causal_stay_dense():
    layer_types = ["full_attention", "full_attention"]
    config = Gemma3TextConfig(**SIZES, head_dim=8, layer_types=layer_types, use_bidirectional_attention=True)
    model, ids = Gemma3TextModel(config).eval(), tokens()
    mask = torch.ones_like(ids)
    mask[1, 30:] = 0
    expected = output(model, ids, attention_mask=mask)
    report = replace_attention(model, num_codes=96, window=64, calibration=[(ids, mask)])
    assert "dense L x L masks" in str(report)
    real = mask.bool()
    swapped = output(model, ids, attention_mask=mask)
    torch.testing.assert_close(swapped[real], expected[real], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(output(model, ids)[:1], expected[:1], atol=2e-5, rtol=1e-4)  # the row without a mask
    report.restore()
    assert torch.equal(output(model, ids, attention_mask=mask), expected)


def replaced(model):
    replace_attention(model, **COARSE, calibration=[tokens()])
    return model


def test_packed_sequences_are_refused():
    model = replaced(llama())
    positions = torch.cat([torch.arange(20), torch.arange(17)]).expand(2, -1)
    with pytest.raises(NotImplementedError, match="Packed sequences"):
        output(model, tokens(), position_ids=positions, use_cache=False)


def test_masks_of_wrong_shape_are_refused():
    model = replaced(gpt2())
    with pytest.raises((ValueError, NotImplementedError), match="attention"):
        output(model, tokens(), attention_mask=torch.ones(2, 30, dtype=torch.long))
