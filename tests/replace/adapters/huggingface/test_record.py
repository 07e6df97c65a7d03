"""Configs of transformers models: replacing one model never changes another, and restoring puts the config back."""

import copy

import pytest
import torch

from longvq_layers.replace import replace_attention, restore_attention
from tests.replace.models import COARSE, FINE, bert_config, gpt2, llama, output, padded, tokens
from tests.tolerances import assert_close


def test_two_models_of_one_config_do_not_affect_each_other():
    from transformers import BertModel

    config = bert_config()
    one, other = BertModel(config).eval(), BertModel(config).eval()
    ids = tokens()
    expected = output(other, ids)
    before = {name: module.__dict__.get("config") for name, module in other.named_modules()}
    replace_attention(one, **COARSE, calibration=[ids])
    assert torch.equal(output(other, ids), expected)
    after = {name: module.__dict__.get("config") for name, module in other.named_modules()}
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)
    assert config._attn_implementation == other.config._attn_implementation == "sdpa"
    fresh = BertModel(config).eval()
    assert not any("longvq" in name for name in fresh.state_dict())


@pytest.mark.parametrize("partial", [False, True])
def test_partial_replacement_is_reported_and_right(partial):
    model, inputs = gpt2(), padded("left")
    expected = output(model, **inputs)
    filter_fn = (lambda module, name: name.endswith("h.1.attn")) if partial else None
    report = replace_attention(model, **FINE, calibration=[inputs], filter_fn=filter_fn)
    assert [layer.name for layer in report.replaced] == [
        name for name in ("transformer.h.0.attn", "transformer.h.1.attn") if not partial or name.endswith("1.attn")
    ]
    assert model.transformer.config._attn_implementation == ("sdpa" if partial else "longvq")
    real = inputs["attention_mask"].bool()
    assert_close(output(model, **inputs)[real], expected[real], "gpt2")
    if partial:
        assert "filter_fn returned False" in str(report)


def test_what_changes_in_the_config_meanwhile_stays():
    for changed in (lambda model: model, copy.deepcopy):
        model, ids = gpt2(), tokens()
        model.config.old = 1
        replace_attention(model, **COARSE, calibration=[ids])
        model = changed(model)
        model.resize_token_embeddings(200, mean_resizing=False)
        model.config.pad_token_id, model.config.note = 7, "new"
        del model.config.old
        restore_attention(model)
        assert (model.config.vocab_size, model.config.pad_token_id, model.config.note) == (200, 7, "new")
        assert not hasattr(model.config, "old") and model.config._attn_implementation == "sdpa"
        assert model(ids, labels=ids).loss.isfinite()


@pytest.mark.parametrize("training", [False, True])
def test_a_model_made_from_the_config_of_a_replaced_one_says_so(training):
    model, ids = llama(), tokens()
    replace_attention(model, **COARSE, calibration=[ids])
    for config in (model.config, copy.deepcopy(model.config)):
        twin = type(model)(config).train(training)
        with pytest.raises(RuntimeError, match="was made from the config of one with replaced attention"):
            twin(ids)
    config._attn_implementation = "sdpa"
    assert type(model)(config).train(training)(ids).logits.isfinite().all()
    assert output(model, ids).isfinite().all()


def test_deep_copies_restore_by_themselves():
    model, ids = gpt2(), tokens()
    expected = output(model, ids)
    report = replace_attention(model, **COARSE, calibration=[ids])
    swapped = output(model, ids)
    twin = copy.deepcopy(model)
    assert torch.equal(output(twin, ids), swapped)
    restore_attention(twin)
    assert torch.equal(output(twin, ids), expected) and torch.equal(output(model, ids), swapped)
    report.restore()
    assert torch.equal(output(model, ids), expected)
