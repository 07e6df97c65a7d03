"""Calibration: its inputs, the errors that it measures, and the gain that it chooses per head."""

from unittest import mock

import pytest
import torch
from torch import nn

from longvq_layers import commitment_loss
from longvq_layers.replace import replace_attention
from longvq_layers.replace.calibration import recorder as recording
from longvq_layers.replace.calibration.recorder import Recorder
from longvq_layers.replace.distill.api import distill_attention
from longvq_layers.replace.slot.swapped import SwappedAttention
from tests.replace.models import COARSE, FAMILIES, bert, encoder, output, snapshot, tokens


def test_errors_fall_with_more_codes():
    model, errors = bert(), []
    for num_codes in (4, 16, 64):
        report = replace_attention(model, num_codes=num_codes, window=0, calibration=[tokens(4, 64)])
        errors.append([(layer.key_error, layer.output_error) for layer in report.layers])
        report.restore()
    for layer in range(2):
        keys, outputs = zip(*[error[layer] for error in errors], strict=True)
        assert keys[0] > keys[1] > keys[2] and outputs[0] > outputs[1] > outputs[2]


def test_calibration_takes_any_kind_of_input_and_ignores_padding():
    ids, mask = tokens(), torch.ones(2, 37, dtype=torch.long)
    reports = [
        replace_attention(bert(), **COARSE, calibration=calibration)
        for calibration in ([ids], [(ids, mask)], iter([{"input_ids": ids, "attention_mask": mask}]), [[ids]])
    ]
    assert len({report.calibration_keys for report in reports}) == 1
    mask[1, 20:] = 0
    report = replace_attention(bert(), **COARSE, calibration=[(ids, mask)])
    assert report.calibration_keys == 37 + 20


def test_calibration_in_inference_mode_leaves_ordinary_tensors():
    model, x = encoder(), torch.randn(2, 31, 32)
    with torch.inference_mode():
        replace_attention(model, **COARSE, calibration=[x])
        model(x)
    assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))
    model.train()
    for _ in range(2):
        model(x).square().mean().backward()
    learning = encoder().train()
    with torch.inference_mode():
        replace_attention(learning, **COARSE)
    (learning(x).square().mean() + commitment_loss(learning)).backward()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_calibration_that_is_not_finite_is_refused_and_padding_may_be(value):
    good, bad = torch.randn(2, 9, 32), torch.randn(2, 9, 32)
    bad[1, 4] = value
    padding = torch.zeros(2, 9, dtype=torch.bool)
    model = encoder()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"calibration must give finite \w+ .* from batch 1 in layers.0.self_attn"):
        replace_attention(model, **COARSE, calibration=[good, bad])
    assert snapshot(model) == before
    padding[1, 4] = True
    module = Attention().eval()
    recorder = Recorder()
    recorder.observe(*[bad[:, None]] * 4, causal=False, key_padding_mask=padding, scale=None)
    assert recorder.moment.isfinite().all() and recorder.keys.shape[1] == 17
    module.attention.in_proj_weight.data[0] = value
    with pytest.raises(ValueError, match="calibration must give finite queries"):
        replace_attention(module, **COARSE, calibration=[good])


class Attention(nn.Module):
    """One nn.MultiheadAttention, with padding."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x, padding=None):
        return self.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0]


def test_every_key_is_a_code_where_there_are_enough():
    x = tokens(1, 30)
    model = FAMILIES["bert"]()
    expected = output(model, x)
    replace_attention(model, num_codes=64, window=3, calibration=[x])
    torch.testing.assert_close(output(model, x), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("length", "kept", "said"), [(39, 20_480, True), (40, 20_480, False), (39, 78, False)])
def test_few_keys_for_many_codes_are_reported(length, kept, said, monkeypatch):
    monkeypatch.setattr(recording, "KEYS_PER_HEAD", kept)  # the report can't ask for more than are kept
    report = replace_attention(FAMILIES["bert"](), num_codes=8, window=3, calibration=[tokens(2, length)])
    note = f"8 codes were fitted to {2 * length} keys per head"
    assert all(any(note in one for one in layer.notes) == said for layer in report.layers)
    assert ("calibrate on at least 80" in str(report)) == said


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_each_head_gets_the_gain_that_is_best(family):
    torch.manual_seed(0)
    model, x = FAMILIES[family](), tokens(2, 80)
    found = {}
    for gains in ((1.0,), (0.0,), recording.GAINS):
        with mock.patch.object(recording, "GAINS", gains):
            report = replace_attention(model, **COARSE, calibration=[x])
        slots = [module for module in model.modules() if isinstance(module, SwappedAttention)]
        found[gains] = [layer.output_error for layer in report.layers], [slot.spread_gain.tolist() for slot in slots]
        if gains is recording.GAINS and family == "bert":  # what the report says is what the model does
            errors = distill_attention(model, [x, x], steps=0).before
            assert list(errors.values()) == pytest.approx(found[gains][0], rel=1e-3)
        report.restore()
    best, chosen = found[recording.GAINS]
    for single in ((1.0,), (0.0,)):
        assert all(a <= b * 1.0001 for a, b in zip(best, found[single][0], strict=True))
    assert {gain for gains in chosen for gain in gains} <= set(recording.GAINS)
    assert any(gain < 1 for gains in chosen for gain in gains)


def test_without_the_correction_there_is_nothing_to_choose():
    model = FAMILIES["bert"]()
    replace_attention(model, **COARSE, calibration=[tokens()], variance_correction=False)
    slots = [module for module in model.modules() if isinstance(module, SwappedAttention)]
    assert all((slot.spread_gain == 1).all() for slot in slots)


def test_gains_are_saved():
    model, x = FAMILIES["bert"](), tokens(2, 80)
    replace_attention(model, **COARSE, calibration=[x])
    other = FAMILIES["bert"]()
    replace_attention(other, **COARSE, calibration=[tokens(2, 80, seed=1)])
    other.load_state_dict(model.state_dict())
    assert torch.equal(output(other, x), output(model, x))
