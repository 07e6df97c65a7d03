"""Transformers modules that can't be replaced, and calls that can't be served: each error says why."""

import copy
import subprocess
import sys

import pytest
import torch
from transformers import (
    BartConfig,
    BartModel,
    BertModel,
    MistralConfig,
    MistralModel,
    Qwen2Config,
    Qwen2Model,
    StaticCache,
    T5Config,
    T5EncoderModel,
)

from longvq_layers.models.huggingface.cache_name import NAME
from longvq_layers.replace import replace_attention, restore_attention
from tests.replace.models import COARSE, TOKENS, VOCABULARY, bert, bert_config, gpt2, llama, output, tokens

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
SIZES |= {"num_hidden_layers": 2, "vocab_size": VOCABULARY, **TOKENS}


def bart():
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4}
    sizes |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": VOCABULARY}
    return BartModel(BartConfig(**sizes, max_position_embeddings=64, init_std=0.3, **TOKENS)).eval()


def t5():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": VOCABULARY}
    return T5EncoderModel(T5Config(**sizes)).eval()


def mistral():
    return MistralModel(MistralConfig(**SIZES, sliding_window=8)).eval()


def cross_bert():
    return BertModel(bert_config(is_decoder=True, add_cross_attention=True)).eval()


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (bart, "encoder_attn: cross-attention"),
        (cross_bert, "crossattention.self: cross-attention"),
        (lambda: gpt2(add_cross_attention=True), "crossattention: cross-attention"),
        (t5, "additive position bias"),
        (mistral, r"sliding-window attention \(8\)"),
        (lambda: bert(attn_implementation="eager", output_attentions=True), "config.output_attentions is True"),
    ],
)
def test_refused_before_anything_is_touched(build, reason):
    model = build()
    names = list(model.state_dict())
    with pytest.raises(NotImplementedError, match=reason):
        replace_attention(model, **COARSE, calibration=[tokens()])
    assert list(model.state_dict()) == names and model.config._attn_implementation != "longvq"


def test_not_strict_skips_and_reports():
    model, ids = bart(), tokens()
    expected = output(model, ids)
    report = replace_attention(model, num_codes=96, window=64, calibration=[ids], strict=False)
    assert [layer.name for layer in report.skipped] == ["decoder.layers.0.encoder_attn"]
    assert len(report.replaced) == 2 and "cross-attention" in str(report)
    torch.testing.assert_close(output(model, ids), expected, atol=2e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"nothing to replace in T5EncoderModel:\n.*additive position bias"):
        replace_attention(t5(), **COARSE, calibration=[ids], strict=False)


def test_layers_with_a_sliding_window_are_told_from_the_others():
    layer_types = ["sliding_attention", "full_attention"]
    config = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, layer_types=layer_types)
    model, ids = Qwen2Model(config).eval(), tokens()
    expected = output(model, ids)
    report = replace_attention(model, num_codes=96, window=64, calibration=[ids], strict=False)
    assert [layer.name for layer in report.replaced] == ["layers.1.self_attn"]
    torch.testing.assert_close(output(model, ids), expected, atol=2e-5, rtol=1e-4)


def test_calls_that_calibration_refuses_name_their_module():
    model, ids = llama(), tokens()
    positions = torch.cat([torch.arange(20), torch.arange(17)]).expand(2, -1)
    calibration = [{"input_ids": ids, "position_ids": positions, "use_cache": False}]
    with pytest.raises(NotImplementedError, match=r"model.layers.0.self_attn: in calibration, .*packed sequences"):
        replace_attention(model, **COARSE, calibration=calibration)
    with pytest.raises(
        ValueError, match=r"nothing to replace (.|\n)*layers.0(.|\n)*layers.1.self_attn: in calibration"
    ):
        replace_attention(model, **COARSE, calibration=calibration, strict=False)
    assert model.config._attn_implementation != "longvq"


def replaced(model):
    replace_attention(model, **COARSE, calibration=[tokens()])
    return model


@pytest.mark.parametrize("build", [bert, gpt2, llama])
def test_attention_weights_are_refused_at_the_call(build):
    model = replaced(build())
    with pytest.raises(NotImplementedError, match="output_attentions must be False, got True"):
        output(model, tokens(), output_attentions=True)
    assert output(model, tokens(), output_attentions=False).isfinite().all()


@pytest.mark.parametrize("build", [bert, llama])
def test_another_attention_is_not_set_silently(build):
    model = build()
    expected, swapped = output(model, tokens()), output(replaced(model), tokens())
    for one in (copy.deepcopy(model), model):
        one.set_attn_implementation("eager")
        with pytest.raises(RuntimeError, match=r"set to 'eager' .*call restore_attention"):
            output(one, tokens())
        if one is not model:
            assert torch.equal(output(model, tokens()), swapped)
        restore_attention(one)
        assert torch.equal(output(one, tokens()), expected)
    replace_attention(model, **COARSE, calibration=[tokens()], filter_fn=lambda module, name: ".1." in name)
    swapped = output(model, tokens())
    model.set_attn_implementation("eager")  # of the other layers; replaced layers have their own config
    torch.testing.assert_close(output(model, tokens()), swapped)


def test_static_caches_are_refused():
    model = replaced(llama())
    cache = StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(NotImplementedError, match="Static caches"):
        output(model, tokens(), **{NAME: cache})


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias", "head_mask", "sliding_window", "cu_seq_lens_q"])
def test_arguments_that_change_scores_are_refused_by_name(name):
    model = replaced(bert())
    with pytest.raises(NotImplementedError, match=f"longvq attention: {name} must be None, got Tensor"):
        output(model, tokens(), **{name: torch.ones(3)})


def test_the_name_alone_is_not_enough():
    replaced(bert())  # registers the implementation
    with pytest.raises(RuntimeError, match="has no codes; call"):
        output(bert(attn_implementation="longvq"), tokens())


def test_transformers_is_only_imported_for_its_models():
    code = """
import sys
sys.modules["transformers"] = None  # as if it were not installed
import torch, longvq_layers
model = torch.nn.TransformerEncoderLayer(32, 4, batch_first=True).eval()
report = longvq_layers.replace_attention(model, num_codes=4, calibration=[torch.randn(2, 9, 32)])
model(torch.randn(2, 9, 32))
report.restore()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("indexed_attention", "layers of type 'indexed_attention'"),
        ("chunked_attention", "sliding-window attention .chunked_attention."),
    ],
)
def test_other_types_of_layers_are_refused_by_name(kind, reason):
    model = gpt2()
    model.config.layer_types = [kind, "full_attention"]
    with pytest.raises(NotImplementedError, match=reason):
        replace_attention(model, **COARSE, calibration=[tokens()])
