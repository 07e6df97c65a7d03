"""How much attention each key receives, against the definition."""

import pytest
import torch

from longvq_layers.replace.calibration import key_importance
from longvq_layers.replace.calibration.key_importance import attention_received


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
    monkeypatch.setattr(key_importance, "_SCORES", at_once)
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
    monkeypatch.setattr(key_importance, "_QUERIES", 200)
    some = attention_received(q, k, real)
    assert (some.sum() / every.sum() - 1).abs() < 0.02
    assert torch.corrcoef(torch.stack([some.flatten(), every.flatten()]))[0, 1] > 0.9


def test_half_precision_and_nothing_allowed_are_finite():
    q, k, real = inputs()
    real[0] = False
    found = attention_received(q.bfloat16(), k.bfloat16(), real, causal=True)
    assert found.dtype == torch.float32 and found.isfinite().all() and not found[0].any()
