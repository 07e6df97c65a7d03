"""What calibration looks at beside the keys: the attention they receive, and how far a head trusts the spread."""

from unittest import mock

import pytest
import torch

from longvq_layers.replace import replace_attention
from longvq_layers.replace.distill.api import distill_attention
from longvq_layers.replace.slot import key_importance as receiving
from longvq_layers.replace.slot import recorder as calibrating
from longvq_layers.replace.slot.key_importance import attention_received
from longvq_layers.replace.slot.swapped import SwappedAttention
from tests.replace.models import FAMILIES, output, tokens

COARSE = {"num_codes": 8, "window": 5}


def inputs(length: int = 37) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q (2, 4, L, 8), k (2, 2, L, 8), real (2, L) with padding on both sides of the second row."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, length, 8, generator=generator) for heads in (4, 2))
    real = torch.ones(2, length, dtype=torch.bool)
    real[1, :3] = real[1, -4:] = False
    return q, k, real


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [0, 1, 6, 100])
@pytest.mark.parametrize("at_once", [1, 1 << 24])
def test_attention_received_is_summed_over_far_queries(causal, window, at_once, monkeypatch):
    monkeypatch.setattr(receiving, "_SCORES", at_once)
    q, k, real = inputs()
    expected = torch.zeros(2, 2, 37)
    for row in range(2):
        for head in range(4):
            for i in range(37):
                keys = [j for j in range(37) if real[row, j] and (j <= i or not causal)]
                if not real[row, i] or not keys:
                    continue
                weights = (0.4 * k[row, head // 2, keys] @ q[row, head, i]).softmax(-1)
                for j, weight in zip(keys, weights, strict=True):
                    expected[row, head // 2, j] += weight * (abs(i - j) >= window)
    found = attention_received(q, k, real, window=window, causal=causal, scale=0.4)
    torch.testing.assert_close(found, expected)


def test_few_queries_stand_for_the_many_of_a_long_sequence(monkeypatch):
    q, k, real = inputs(600)
    every = attention_received(q, k, real)
    monkeypatch.setattr(receiving, "_QUERIES", 200)
    some = attention_received(q, k, real)
    assert (some.sum() / every.sum() - 1).abs() < 0.02
    assert torch.corrcoef(torch.stack([some.flatten(), every.flatten()]))[0, 1] > 0.9


def test_half_precision_and_nothing_allowed_are_finite():
    q, k, real = inputs()
    real[0] = False
    found = attention_received(q.bfloat16(), k.bfloat16(), real, causal=True)
    assert found.dtype == torch.float32 and found.isfinite().all() and not found[0].any()


def test_keys_that_are_looked_at_get_finer_codes():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 2000, 8, generator=generator)
    weight = torch.zeros(2, 2000)
    weight[:, :200] = 1.0
    errors = {}
    for name, given in (("uniform", None), ("weighted", weight), ("nothing", torch.zeros(2, 2000))):
        slot = SwappedAttention(2, 2, 8, num_codes=64, window=0, local_keys="exact").eval()
        generator = torch.Generator().manual_seed(1)
        slot.fit_(keys, torch.eye(8).expand(2, 8, 8), weight=given, generator=generator)
        coded = slot.codebook.embedding.gather(1, slot.codebook(keys[None])[0].unsqueeze(-1).expand(-1, -1, 8))
        errors[name] = (keys - coded).square().sum(-1)
        assert slot.codebook.embedding.isfinite().all() and (slot.spread >= 0).all()
    assert errors["weighted"][:, :200].mean() < 0.8 * errors["uniform"][:, :200].mean()
    assert errors["weighted"][:, 200:].mean() < 1.3 * errors["uniform"][:, 200:].mean()  # the others aren't given up


def test_every_key_is_a_code_where_there_are_enough():
    x = tokens(1, 30)
    model = FAMILIES["bert"]()
    expected = output(model, x)
    replace_attention(model, num_codes=64, window=3, calibration=[x])
    torch.testing.assert_close(output(model, x), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("length", "kept", "said"), [(39, 20_480, True), (40, 20_480, False), (39, 78, False)])
def test_few_keys_for_many_codes_are_reported(length, kept, said, monkeypatch):
    monkeypatch.setattr(calibrating, "KEYS_PER_HEAD", kept)  # more than are kept can't be asked for
    report = replace_attention(FAMILIES["bert"](), num_codes=8, window=3, calibration=[tokens(2, length)])
    note = f"8 codes were fitted to {2 * length} keys per head"
    assert all(any(note in one for one in layer.notes) == said for layer in report.layers)
    assert ("calibrate on at least 80" in str(report)) == said


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_each_head_gets_the_gain_that_is_best(family):
    torch.manual_seed(0)
    model, x = FAMILIES[family](), tokens(2, 80)
    found = {}
    for gains in ((1.0,), (0.0,), calibrating.GAINS):
        with mock.patch.object(calibrating, "GAINS", gains):
            report = replace_attention(model, **COARSE, calibration=[x])
        slots = [module for module in model.modules() if isinstance(module, SwappedAttention)]
        found[gains] = [layer.output_error for layer in report.layers], [slot.spread_gain.tolist() for slot in slots]
        if gains is calibrating.GAINS and family == "bert":  # what the report says is what the model does
            errors = distill_attention(model, [x, x], steps=0).before
            assert list(errors.values()) == pytest.approx(found[gains][0], rel=1e-3)
        report.restore()
    best, chosen = found[calibrating.GAINS]
    for single in ((1.0,), (0.0,)):
        assert all(a <= b * 1.0001 for a, b in zip(best, found[single][0], strict=True))
    assert {gain for gains in chosen for gain in gains} <= set(calibrating.GAINS)
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


@pytest.mark.parametrize("padded", [False, True])
def test_codes_of_a_sequence_are_means_of_its_own_keys(padded):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, heads, 50, 8, generator=generator) for heads in (4, 2, 2))
    padding = torch.zeros(3, 50, dtype=torch.bool)
    padding[0, :5] = padding[1, 30:] = padded
    k = k.masked_fill(padding[:, None, :, None], torch.nan)
    v = v.masked_fill(padding[:, None, :, None], torch.nan)
    slot = SwappedAttention(4, 2, 8, num_codes=6, window=4, local_keys="exact").eval()
    slot.fit_(torch.randn(2, 100, 8, generator=generator), torch.eye(8).expand(2, 8, 8), generator=generator)
    found = slot(q, k, v, padding if padded else None, scale=0.4)
    codes = slot.codebook(k.nan_to_num())
    for row in range(3):
        real = ~padding[row]
        at = real.nonzero().flatten()
        for head in range(4):
            keys, code = k[row, head // 2, real], codes[row, head // 2, real]
            same = (code[:, None] == code).float()
            means = same @ keys / same.sum(-1, keepdim=True)
            spread = same @ (keys - means).square().sum(-1) / same.sum(-1)
            own = q[row, head, real]
            far = 0.4 * own @ means.T + 0.5 * 0.4**2 / 8 * own.square().sum(-1, keepdim=True) * spread
            inside = (at[:, None] - at).abs() < 4
            weights = torch.where(inside, 0.4 * own @ keys.T, far).softmax(-1)
            torch.testing.assert_close(found[row, head, real], weights @ v[row, head // 2, real])
    assert not found.masked_select(padding[:, None, :, None]).any()


def test_other_sequences_of_a_batch_change_nothing():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, heads, 50, 8, generator=generator) for heads in (4, 2, 2))
    slot = SwappedAttention(4, 2, 8, num_codes=6, window=4, local_keys="exact").eval()
    slot.fit_(k.transpose(0, 1).flatten(1, 2), torch.eye(8).expand(2, 8, 8), generator=generator)
    torch.testing.assert_close(slot(q, k, v)[1:2], slot(q[1:2], k[1:2], v[1:2]))
    none = slot(q[:0], k[:0], v[:0], torch.zeros(0, 50, dtype=torch.bool))
    assert none.shape == (0, 4, 50, 8)
