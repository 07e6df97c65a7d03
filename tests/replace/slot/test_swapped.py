"""The swapped attention by itself: metric, spread, codes of a sequence, limit on far keys, gradients."""

import pytest
import torch
from torch import nn

from longvq_layers.replace import replace_attention
from longvq_layers.replace.slot.swapped import SwappedAttention
from tests.replace.models import COARSE, llama, tokens
from tests.tolerances import assert_close


def test_the_query_metric_beats_plain_distance():
    # Queries look along one direction only, so codes that differ in other directions are wasted.
    from longvq_layers import ops
    from longvq_layers.replace.slot.swapped import SwappedAttention

    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 400, 16, generator=generator).unbind(0)
    q = q * torch.tensor([4.0] + [0.1] * 15)
    exact = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    errors = {}
    for name, moment in (("metric", q[0].transpose(1, 2) @ q[0] / 400), ("plain", torch.eye(16).repeat(2, 1, 1))):
        slot = SwappedAttention(2, 2, 16, num_codes=16, window=0, local_keys="exact", variance_correction=False)
        slot.fit_(k[0], moment, generator=generator)
        out = slot.eval()(q, k, v, causal=True)
        errors[name] = (out - exact).norm() / exact.norm()
        dense = ops.vq_attention(
            q, k, v, slot.codebook.embedding @ slot.from_metric, codes=slot.codebook(k @ slot.to_metric), causal=True
        )
        torch.testing.assert_close(out, dense)
    assert errors["metric"] < 0.5 * errors["plain"]


def test_a_code_accounts_for_the_spread_of_its_keys():
    from longvq_layers.replace.slot.swapped import SwappedAttention

    q, k, v = torch.randn(2, 4, 200, 16), torch.randn(2, 2, 200, 16), torch.randn(2, 2, 200, 16)
    k[:, :, ::2] *= 0.1  # half of the keys are close together; their values differ from those of the others
    v[:, :, ::2] += 2
    exact = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, is_causal=True, scale=0.4)
    errors = []
    for corrected in (True, False):
        slot = SwappedAttention(4, 2, 16, num_codes=8, window=0, local_keys="exact", variance_correction=corrected)
        slot.fit_(k.transpose(0, 1).flatten(1, 2), torch.diag(torch.linspace(0.2, 2, 16)).expand(2, 16, 16))
        out = slot.eval()(q, k, v, causal=True, scale=0.4)
        # The definition, pair by pair: the code's score plus half the variance of the score over the code's keys.
        metric_keys = slot.in_metric(k)
        codes = slot.codebook(metric_keys).repeat_interleave(2, dim=1)
        books = slot.codebook.embedding.repeat_interleave(2, dim=0)
        coded = books.gather(1, codes.transpose(0, 1).flatten(1)[..., None].expand(-1, -1, 16))
        coded = coded.unflatten(1, (2, 200)).transpose(0, 1)  # (B, H, L, D)
        error = (metric_keys.repeat_interleave(2, dim=1) - coded).square().sum(-1)
        spread = torch.zeros_like(error)
        for code in range(8):
            of_code = (codes == code).float()
            mean = (error * of_code).sum((0, 2)) / of_code.sum((0, 2)).clamp(min=1)
            # The same for both query heads of a key-value head.
            mean = mean.unflatten(0, (2, 2)).mean(1).repeat_interleave(2)
            spread += of_code * mean[None, :, None]
        metric_q = q @ slot.from_metric.repeat_interleave(2, dim=0)
        scores = 0.4 * metric_q @ coded.transpose(-1, -2)
        if corrected:
            scores = scores + 0.5 * 0.4**2 / 16 * metric_q.square().sum(-1)[..., None] * spread[:, :, None, :]
        scores = scores.masked_fill(torch.ones(200, 200, dtype=torch.bool).triu(1), -torch.inf)
        expected = scores.softmax(-1) @ v.repeat_interleave(2, dim=1)
        assert_close(out, expected, "corrected" if corrected else "plain")
        errors.append((out - exact).norm() / exact.norm())
    assert errors[0] < errors[1]


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
    assert (
        errors["weighted"][:, 200:].mean() < 1.3 * errors["uniform"][:, 200:].mean()
    )  # the other keys keep their codes


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


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_codes_get_the_gradient_of_finite_differences(apart, backend):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 40, 8, generator=generator, dtype=torch.float64) for h in (4, 2, 2))
    far = tuple(torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (q, k)) if apart else None
    padding = torch.zeros(2, 40, dtype=torch.bool)
    padding[1, 31:] = True
    slot = SwappedAttention(4, 2, 8, num_codes=6, window=4, local_keys="exact", backend=backend, dtype=torch.float64)
    keys = (k if far is None else far[1]).transpose(0, 1).flatten(1, 2)
    slot.eval().fit_(keys, torch.eye(8, dtype=torch.float64).expand(2, 8, 8), generator=generator)
    slot.spread_gain.fill_(0.7)
    toward = torch.randn(q.shape, generator=generator, dtype=torch.float64)

    def loss() -> torch.Tensor:
        return (slot(q, k, v, padding, far=far, causal=True) * toward).sum()

    trained = [slot.codebook.embedding, slot.spread, slot.spread_gain]
    plain = loss()
    for tensor in trained:
        tensor.requires_grad_(True)
    value = loss()
    torch.testing.assert_close(value, plain)
    for tensor, gradient in zip(trained, torch.autograd.grad(value, trained), strict=True):
        direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            sides = []
            for sign in (1, -1):
                tensor.add_(sign * 1e-6 * direction)
                sides.append(loss())
                tensor.sub_(sign * 1e-6 * direction)
        expected = (sides[0] - sides[1]) / 2e-6
        assert expected.abs() > 1e-6
        torch.testing.assert_close((gradient * direction).sum(), expected, rtol=1e-5, atol=1e-7)


def test_keys_get_the_gradient_of_their_mean_in_bidirectional_attention():
    # Without a window the output depends on keys only through the means of codes, so finite differences are exact.
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 40, 8, generator=generator, dtype=torch.float64) for h in (4, 2, 2))
    options = {"num_codes": 6, "window": 0, "local_keys": "exact", "variance_correction": False, "backend": "torch"}
    slot = SwappedAttention(4, 2, 8, **options, dtype=torch.float64).eval()
    slot.fit_(k.transpose(0, 1).flatten(1, 2), torch.eye(8).double().expand(2, 8, 8), generator=generator)
    toward = torch.randn(q.shape, generator=generator, dtype=torch.float64)
    direction = torch.randn(k.shape, generator=generator, dtype=torch.float64)
    k.requires_grad_(True)
    (gradient,) = torch.autograd.grad((slot(q, k, v) * toward).sum(), k)
    with torch.no_grad():
        sides = [(slot(q, k + sign * 1e-6 * direction, v) * toward).sum() for sign in (1, -1)]
    torch.testing.assert_close((gradient * direction).sum(), (sides[0] - sides[1]) / 2e-6, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("trained_length", [20, 10_000])
def test_far_keys_count_as_in_training_at_most(trained_length):
    """The dense definition: N keys outside the window have the weight n / N each; training had at most n of them."""
    torch.manual_seed(0)
    window, length = 6, 60
    model = llama()
    options = {"num_codes": 256, "window": window, "variance_correction": False}
    replace_attention(model, **options, calibration=[tokens(2, length)], trained_length=trained_length)
    module = model.model.layers[0].self_attn
    slot, seen = module.longvq, {}
    q, k, v = (torch.randn(2, heads, length, 8) for heads in (4, 2, 2))
    far_q, far_k = torch.randn(2, 4, length, 8), tokens_as_keys(slot, 2, length)
    mask = torch.zeros(2, length, dtype=torch.bool)
    mask[1, :9] = True
    out = slot(q, k, v, mask, far=(far_q, far_k), causal=True, scale=0.4)
    k, v, far_k = (x.repeat_interleave(2, dim=1) for x in (k, v, far_k))
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = (~mask).cumsum(1)
    weight = ((trained_length - window) / (seen - window).clamp(min=1)).clamp(max=1)[:, None, :, None]
    scores = torch.where(distance < window, 0.4 * q @ k.mT, 0.4 * far_q @ far_k.mT + weight.log())
    allowed = (distance >= 0) & ~mask[:, None, None, :]
    expected = torch.nan_to_num(scores.masked_fill(~allowed, -torch.inf).softmax(-1)) @ v
    assert_close(out, expected.masked_fill(mask[:, None, :, None], 0), "limit")


def tokens_as_keys(slot, batch, length):
    """Keys that are codewords, so that their codes are exact."""
    codes = torch.randint(slot.num_codes, (batch, 2, length))
    table = slot.codebook.embedding @ slot.from_metric
    return torch.stack([table[head][codes[:, head]] for head in range(2)], dim=1)


def test_the_trained_length_is_that_of_the_config_and_is_reported():
    model = llama(max_position_embeddings=99)
    report = replace_attention(model, **COARSE, calibration=[tokens()])
    assert model.model.layers[0].self_attn.longvq.trained_length == 99
    assert "far keys count as in 99 tokens at most" in str(report)
    with pytest.raises(ValueError, match="trained_length must be at least 1, got 0"):
        replace_attention(llama(), **COARSE, calibration=[tokens()], trained_length=0)
