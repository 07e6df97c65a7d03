"""The entropy of attention against the dense definition, written out pair by pair."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from longvq_layers import replace_attention
from longvq_layers.health import Monitor, attention_entropy
from longvq_layers.layers import CodebookAttention


@torch.no_grad()
def by_definition(attention, q, k, mask=None, documents=None):
    """Entropy over log n of every row and head with n > 1 keys, from loops: {(head, b, i): h}."""
    book, window, values = attention.codebook.embedding, attention.window, {}
    group = attention.num_heads // attention.num_kv_heads
    for h in range(q.shape[1]):
        table = book[h // group]
        for b in range(q.shape[0]):
            for i in range(q.shape[2]):
                if mask is not None and mask[b, i]:
                    continue
                keys = [
                    j
                    for j in range(q.shape[2])
                    if (mask is None or not mask[b, j])
                    and (not attention.causal or j <= i)
                    and (documents is None or documents[i] == documents[j])
                ]
                if len(keys) < 2:
                    continue
                scores = []
                for j in keys:
                    key = k[b, h // group, j]
                    near = 0 <= i - j < window if attention.causal else abs(i - j) < window
                    if not (near and attention.local_keys == "exact"):
                        key = table[(table - key).square().sum(-1).argmin()]
                    score = q[b, h, i] @ key
                    score = score / len(keys) if attention.activation == "laplace" else score / math.sqrt(q.shape[3])
                    if near:
                        score = score + attention.window_bias[h, i - j if attention.causal else j - i + window - 1]
                    scores.append(score)
                weight = torch.stack(scores)
                if attention.activation == "softmax":
                    weight = (weight - weight.max()).exp()
                else:
                    weight = 0.5 * (1 + torch.erf((weight - math.sqrt(0.5)) * math.sqrt(2 * math.pi)))
                if weight.sum() > 0:
                    weight = weight / weight.sum()
                    values[h, b, i] = float(-torch.xlogy(weight, weight).sum() / math.log(len(keys)))
    return values


def made(**options):
    attention = CodebookAttention(4, 2, 6, num_codes=5, dtype=torch.float64, **({"window": 3} | options))
    if attention.window_bias is not None:
        torch.nn.init.normal_(attention.window_bias)
    q, k = 2 * torch.randn(2, 4, 11, 6).double(), torch.randn(2, 2, 11, 6).double()
    attention(q, k, k)
    return attention.eval(), q, k


def mean(values, head):
    values = [value for (h, *_), value in values.items() if h == head]
    return sum(values) / len(values)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("activation", ["softmax", "laplace"])
@pytest.mark.parametrize("local_keys", ["quantized", "exact"])
def test_every_row_equals_the_dense_definition(causal, activation, local_keys):
    attention, q, k = made(causal=causal, activation=activation, local_keys=local_keys)
    mask = torch.zeros(2, 11, dtype=torch.bool)
    mask[0, 8:] = mask[1, :3] = True
    for given in (None, mask):
        expected = by_definition(attention, q, k, given)
        entropy = attention_entropy(attention, q, k, given, queries=1000)
        for head in range(4):
            assert float(entropy[head]) == pytest.approx(mean(expected, head), abs=1e-10)
    assert float((entropy - entropy.mean()).abs().max()) > 1e-3  # the heads differ: nothing is mixed up


def test_documents_do_not_see_each_other():
    attention, q, k = made(causal=True)
    q, k, offsets = q[:1], k[:1], torch.tensor([0, 4, 4, 9, 11], dtype=torch.int32)
    expected = by_definition(attention, q, k, None, documents=[0] * 4 + [1] * 5 + [2] * 2)
    entropy = attention_entropy(attention, q, k, cu_seqlens=offsets, queries=1000)
    assert float(entropy[1]) == pytest.approx(mean(expected, 1), abs=1e-10)


def test_a_sample_is_spread_over_the_unmasked_positions():
    attention, q, k = made(causal=True)
    mask = torch.zeros(2, 11, dtype=torch.bool)
    mask[0, :5] = True
    expected = by_definition(attention, q, k, mask)
    entropy = attention_entropy(attention, q, k, mask, queries=6)
    rows = [(0, 6), (0, 8), (0, 10), (1, 1), (1, 5), (1, 9)]  # the middles of three equal parts of each
    for head in range(4):
        assert float(entropy[head]) == pytest.approx(sum(expected[head, b, i] for b, i in rows) / 6, abs=1e-10)


def test_uniform_and_single_key():
    attention, q, k = made()
    torch.nn.init.zeros_(attention.window_bias)
    assert attention_entropy(attention, q * 0, k).tolist() == pytest.approx([1] * 4)
    assert float(attention_entropy(attention, 1e4 * q, k, queries=1000).max()) < 0.9  # equal codes share, others get 0
    assert attention_entropy(attention, q[:, :, :1], k[:, :, :1]).isnan().all()
    assert attention_entropy(attention, q[:0], k[:0]).isnan().all()
    assert attention_entropy(attention, q, k, torch.ones(2, 11, dtype=torch.bool)).isnan().all()


def test_values_at_masked_positions_do_not_matter():
    attention, q, k = made(local_keys="exact")
    mask = torch.zeros(2, 11, dtype=torch.bool)
    mask[:, 6:] = True
    spoiled = torch.where(mask[:, None, :, None], torch.nan, k)
    assert torch.equal(attention_entropy(attention, q, spoiled, mask), attention_entropy(attention, q, k, mask))


def test_swapped_attention_is_recorded_with_its_own_arguments():
    model = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    x = torch.randn(2, 20, 16)
    replace_attention(model, num_codes=40, window=0, calibration=[x])
    with Monitor(model, queries=1000) as monitor:
        model.eval()(x)
    q, k, _ = torch.nn.functional.linear(x, model.self_attn.in_proj_weight, model.self_attn.in_proj_bias).chunk(3, -1)
    q, k = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in (q, k))
    weight = (q @ k.transpose(2, 3) / math.sqrt(8)).softmax(-1)  # as many codes as keys: the exact attention
    expected = (torch.special.entr(weight).sum(-1) / math.log(20)).mean((0, 2))
    (reading,) = monitor.entropy.values()
    assert reading.calls == 1
    assert torch.allclose(torch.tensor(reading.last), expected, atol=1e-4)


def test_rotary_attention_without_far_positions_is_recorded_too():
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    model = LlamaModel(LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=50, max_position_embeddings=20)).eval()
    ids = torch.randint(3, 50, (2, 60))
    replace_attention(model, num_codes=120, window=6, calibration=[ids], variance_correction=False)
    slot, seen = model.layers[0].self_attn.longvq, {}

    def note(module, args, kwargs):
        seen.update(dict(zip(("q", "k", "v"), args, strict=False)), far=kwargs["far"], scale=kwargs["scale"])

    slot.register_forward_pre_hook(note, with_kwargs=True)
    with Monitor(model, queries=1000) as monitor, torch.no_grad():
        model(ids, use_cache=False)
    (reading,) = monitor.entropy.values()
    q, far_q = seen["q"], seen["far"][0]
    k, far_k = (x.repeat_interleave(2, dim=1) for x in (seen["k"], seen["far"][1]))  # as many codes as keys: exact
    distance, count = torch.arange(60)[:, None] - torch.arange(60), torch.arange(1, 61.0)
    drowned = (14 / (count - 6).clamp(min=1)).clamp(max=1).log()[:, None]  # far keys count as in 20 tokens at most
    scores = torch.where(distance < 6, seen["scale"] * q @ k.mT, seen["scale"] * far_q @ far_k.mT + drowned)
    weight = scores.masked_fill(distance < 0, -torch.inf).softmax(-1)
    entropy = (torch.special.entr(weight).sum(-1) / count.clamp(min=2).log())[:, :, 1:]  # the first sees one key
    assert torch.allclose(torch.tensor(reading.last), entropy.mean((0, 2)), atol=1e-3)
