"""Rotary models whose attention differs a little from what their class says; the sweep over all models found them."""

import pytest
import torch
from transformers import (
    BeamConfig,
    BeamModel,
)

from longvq_layers.replace import replace_attention
from tests.replace.adapters.huggingface.unusual_models import SIZES, gemma3n, smollm3
from tests.replace.models import (
    COARSE,
    FINE,
    llama,
    output,
    tokens,
)
from tests.tolerances import assert_close


def test_a_rotation_of_one_tensor_is_taken_off_too():
    model, ids = gemma3n(shared=0), tokens()
    expected = output(model, ids)
    report = replace_attention(model, num_codes=4, window=64, calibration=[ids], strict=False)
    assert [layer.far_positions for layer in report.replaced] == ["rectified"] * 2
    assert_close(output(model, ids), expected, "wide window")


def test_layers_without_positions_beside_layers_with():
    config = BeamConfig(**SIZES, num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    model, ids = BeamModel(config).eval(), tokens()
    expected = output(model, ids)
    report = replace_attention(model, num_codes=4, window=64, calibration=[ids], strict=False)
    assert [layer.name for layer in report.replaced] == ["layers.1.self_attn"]
    assert_close(output(model, ids), expected, "wide window")


def test_layers_without_positions_are_neither_rectified_nor_rotated():
    model = smollm3()
    report = replace_attention(model, **COARSE, calibration=[tokens()])
    assert [layer.far_positions for layer in report.replaced] == ["rectified", None]


def test_positions_stay_off_once_keys_were_collected_without():
    model, ids = llama(), tokens()
    both = {"input_ids": ids, "attention_mask": torch.ones(2, 1, 37, 37, dtype=torch.bool)}
    with pytest.raises(
        NotImplementedError, match='must be causal with far_positions="rectified", got a bidirectional call'
    ):
        replace_attention(model, **FINE, calibration=[ids, both])
    report = replace_attention(model, **FINE, calibration=[ids, both], far_positions="rotated")
    assert [layer.causal for layer in report.layers] == ["per call"] * 2
