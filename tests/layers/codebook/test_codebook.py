"""The codebook: its updates, statistics, re-seeding, and when and from which keys it learns."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from longvq_layers import ops
from longvq_layers.layers import Codebook, CodebookAttention, LongVQBlock, VQAttention
from longvq_layers.layers.codebook import codebook as codebook_module


class Source:
    """Keys (B, H, L, D) around fixed centres."""

    def __init__(self, heads=2, centres=12, dim=6, noise=0.1):
        self.centres, self.noise = 3 * torch.randn(heads, centres, dim), noise

    def __call__(self, batch=4, length=50):
        heads, centres, dim = self.centres.shape
        index = torch.randint(centres, (heads, batch * length, 1)).expand(-1, -1, dim)
        keys = self.centres.gather(1, index).unflatten(1, (batch, length)).transpose(0, 1)
        return keys + self.noise * torch.randn(keys.shape)


def snapshot(book):
    return {name: value.clone() for name, value in book.state_dict().items()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_averages_follow_the_equations():
    book = Codebook(1, 3, 2, decay=0.9, revive_after=None).double()
    book(torch.randn(2, 1, 20, 2, dtype=torch.float64))
    total, count = book.ema_sum.clone(), book.ema_count.clone()
    for _ in range(3):
        table = total / ((count + 1e-5) * count.sum() / (count.sum() + 3 * 1e-5)).unsqueeze(-1)
        k = torch.randn(2, 1, 20, 2, dtype=torch.float64)
        codes = book(k)
        assert torch.allclose(book.embedding, table)
        assert torch.equal(codes, torch.cdist(k, table).argmin(-1))
        one_hot = torch.nn.functional.one_hot(codes.flatten(), 3).double()
        count = 0.9 * count + 0.1 * one_hot.sum(0)
        total = 0.9 * total + 0.1 * one_hot.T @ k.flatten(0, 2)
        assert torch.allclose(book.ema_count, count) and torch.allclose(book.ema_sum, total)


def test_first_batch_fits_the_codes():
    source = Source(centres=8)
    book = Codebook(2, 8, 6)
    assert not book.initialized
    book(source(8, 100))
    assert book.initialized
    assert (book.quantization_error() < 0.01).all()
    assert (book.usage() == 1).all()
    assert (book.perplexity() > 7).all()


def test_learning_follows_keys_that_move():
    source = Source()
    book = Codebook(2, 12, 6)
    book(source())
    source.centres += 1.5
    k = source(8, 100)

    def error():
        book.eval()
        nearest = torch.stack([book.embedding[h][book(k)[:, h]] for h in range(2)], 1)
        book.train()
        return (k - nearest).square().sum(-1).mean()

    before = error()
    for _ in range(200):
        book(source())
    assert error() < 0.2 * before
    assert (book.quantization_error() < 0.1).all()


def test_statistics():
    book = Codebook(1, 4, 1, decay=0.0, revive_after=None)
    assert book.quantization_error().isnan().all()
    keys = torch.tensor([-10.0, -5.0, 5.0, 10.0]).view(1, 1, 4, 1)
    book(keys)
    book(keys[:, :, :2].repeat(1, 1, 10, 1) + torch.tensor([0.5, -0.5]).repeat_interleave(10).view(-1, 1))
    assert book.perplexity() == pytest.approx(2, rel=1e-3)
    # 20 keys at -10±½ and -5±½: error ¼ each, variance about the mean 6.25 + ¼ (no covariance)
    assert book.quantization_error() == pytest.approx(0.25 / 6.5, rel=1e-3)
    for _ in range(9):
        book(keys[:, :, :2])
    assert book.usage(within=10) == 0.5
    assert book.usage(within=11) == 1


def test_dead_codes_are_revived_with_fresh_averages():
    book, stubborn = Codebook(2, 16, 6, revive_after=5), Codebook(2, 16, 6, revive_after=None)
    old, new = Source(centres=16, noise=0.01), Source(centres=8, noise=0.01)
    new.centres += 40  # nearly all old codes get no key any more
    uses = []
    for step in range(60):
        k = new() if step else old()
        book(k), stubborn(k)
        uses.append(book.usage(3).min())
    assert uses[4] < 0.5 and uses[-1] > 0.9
    errors = []
    batch = new()
    for each in (book.eval(), stubborn.eval()):
        nearest = torch.stack([each.embedding[h][each(batch)[:, h]] for h in range(2)], 1)
        errors.append((batch - nearest).square().sum(-1).mean())
    assert errors[0] < 0.01 < 1 < errors[1]
    # Revived codes lie among the current keys. Old averages would pull them back towards 0.
    assert (book.embedding.mean(-1) > 30).sum() >= 28


def test_without_revival_dead_codes_stay():
    book = Codebook(1, 8, 6, revive_after=None)
    book(Source(heads=1)())
    new = Source(heads=1)
    new.centres += 40
    for _ in range(30):
        book(new())
    assert book.usage() < 0.5
    assert book.embedding.isfinite().all()


def test_masked_and_non_finite_keys_teach_nothing():
    source = Source()
    plain, masked = Codebook(2, 12, 6, revive_after=3), Codebook(2, 12, 6, revive_after=3)
    for step in range(12):
        k = source(3, 20) + 5 * step
        wide, mask = torch.full((3, 2, 33, 6), 1e4), torch.ones(3, 33, dtype=torch.bool)
        wide[:, :, :5] = torch.nan
        wide[:, :, 13:] = k
        mask[:, 13:] = False
        mask[0, 2] = False  # unmasked NaN, as after an overflow in half precision
        for book, keys, padding in ((plain, k, None), (masked, wide, mask)):
            torch.manual_seed(step)
            book(keys, padding)
        assert masked.embedding.isfinite().all()
        assert masked.embedding.abs().max() < 200
        assert torch.allclose(plain.ema_count.sum(-1), masked.ema_count.sum(-1))


def test_all_masked_batch_changes_nothing():
    source, mask = Source(), torch.ones(4, 50, dtype=torch.bool)
    book = Codebook(2, 12, 6)
    book(source(), mask)
    assert not book.initialized
    for _ in range(3):
        book(source())
    before = snapshot(book)
    book(source(), mask)
    after = snapshot(book)
    book(torch.randn(0, 2, 5, 6)), book(torch.randn(2, 2, 0, 6))
    for name in ("ema_sum", "ema_count", "ema_error", "ema_energy", "idle"):
        assert torch.equal(before[name], after[name]) and torch.equal(after[name], getattr(book, name)), name


def test_eval_and_frozen_never_learn():
    source = Source()
    book = Codebook(2, 12, 6, revive_after=2)
    before = snapshot(book)
    book.freeze()(source())
    book.unfreeze().eval()(source())
    assert same(before, snapshot(book))
    book.train()(source())
    for prepare in (book.eval, lambda: book.train().freeze()):
        prepare()
        before = snapshot(book)
        for _ in range(4):
            book(source() + 100)
        assert same(before, snapshot(book))
    book.unfreeze()(source())
    assert not same(before, snapshot(book))


def test_initialize_():
    source = Source()
    keys = source(1, 2000)[0]
    book = Codebook(2, 24, 6).initialize_(keys, generator=torch.Generator().manual_seed(0))
    again = Codebook(2, 24, 6).initialize_(keys, generator=torch.Generator().manual_seed(0))
    assert book.initialized and torch.equal(book.embedding, again.embedding)
    assert (book.quantization_error() < 0.01).all()
    old = book.embedding.clone()
    book(source())
    book(source())
    assert (book.embedding - old).abs().max() < 0.1  # training continues from there, without a new k-means start
    mask = torch.zeros(2000, dtype=torch.bool)
    mask[1000:] = True
    poisoned = keys.clone()
    poisoned[:, 1000:] = torch.nan
    masked = Codebook(2, 24, 6).initialize_(poisoned, mask=mask)
    assert (masked.quantization_error() < 0.01).all()
    with pytest.raises(ValueError, match="keys must hold at least one finite, unmasked key per head, got none"):
        book.initialize_(keys, mask=torch.ones(2000, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"keys must have shape \(H, N, D\) = \(2, N, 6\), got \(2000, 6\)"):
        book.initialize_(keys[0])


def test_two_forwards_before_backward():
    attention = CodebookAttention(2, 2, 6, num_codes=4, window=2)
    q = torch.randn(2, 2, 20, 6, requires_grad=True)
    (
        attention(q, q, q).sum() + attention(q, q, q).sum()
    ).backward()  # learning must not change tensors that autograd saved
    assert q.grad.isfinite().all()


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_learns_once_and_gives_the_same_gradients(reentrant):
    x = torch.randn(2, 30, 8)
    results = []
    for wrap in (lambda layer, x: layer(x), lambda layer, x: checkpoint(layer, x, use_reentrant=reentrant)):
        torch.manual_seed(2)
        layer = VQAttention(8, 2, num_codes=4, window=2)
        for _ in range(3):
            wrap(layer, x.clone().requires_grad_()).square().sum().backward()
        results.append([*(p.grad for p in layer.parameters()), *layer.buffers()])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_half_precision_keys_are_counted_in_float32():
    book = Codebook(1, 2, 1, decay=0.0, revive_after=None)
    k = torch.tensor([1.0, 100.0]).repeat(3000).view(1, 1, -1, 1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        book(k)
        book(k)
    assert book.ema_count.flatten().tolist() == [3000, 3000]  # a bfloat16 counter stops at 256
    assert sorted(book.ema_sum.flatten().tolist()) == [3000, 300000]


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keys_are_read_as_they_are(dtype, backend, monkeypatch):
    read = []

    def assign(k, codebook, **options):
        read.append(k.dtype)
        return ops.vq_assign(k, codebook, **options)

    monkeypatch.setattr(codebook_module, "ops", SimpleNamespace(vq_assign=assign))
    source, books = Source(), []
    batches = [source().to(dtype) for _ in range(4)]
    for wide in (False, True):
        torch.manual_seed(3)
        books.append(Codebook(2, 8, 6, backend=backend))
        codes = [books[-1](k.float() if wide else k) for k in batches]
        books[-1].eval()
        read.clear()
        codes.append(books[-1](batches[0].float() if wide else batches[0]))
        assert read == [torch.float32 if wide else dtype]  # not copied to float32
        books[-1].codes = codes
    assert same(*map(snapshot, books))
    assert all(torch.equal(a, b) for a, b in zip(books[0].codes, books[1].codes, strict=True))


def test_wrong_arguments_are_named():
    for name, value, text in (
        ("decay", 1.0, "at least 0 and below 1, got 1.0"),
        ("revive_after", 0, "at least 1 step, or None for never, got 0"),
        ("eps", 0.0, "a positive number of keys, got 0.0"),
    ):
        with pytest.raises(ValueError, match=f"Codebook: {name} must be {text}"):
            Codebook(1, 2, 3, **{name: value})
    with pytest.raises(ValueError, match="num_codes must be at least 1, got 0"):
        Codebook(1, 0, 3)
    book = Codebook(2, 4, 6)
    with pytest.raises(ValueError, match=r"k must have shape \(B, H, L, D\) = \(1, 2, 5, 6\), got \(1, 3, 5, 6\)"):
        book(torch.randn(1, 3, 5, 6))
    with pytest.raises(TypeError, match=r"k must be a real floating-point tensor, got torch\.int64"):
        book(torch.zeros(1, 2, 5, 6, dtype=torch.int64))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_drops_the_same_elements_again(reentrant):
    """Learning must not use torch's generator: the second forward has to draw the same dropout as the first."""
    results = []
    x = torch.randn(2, 30, 16)
    for wrap in (lambda layer, x: layer(x), lambda layer, x: checkpoint(layer, x, use_reentrant=reentrant)):
        torch.manual_seed(0)
        layer = LongVQBlock(16, num_codes=4, window=3, d_state=4, dropout=0.5)
        for _ in range(3):  # the first forward fits the codebook by k-means
            layer.zero_grad()
            wrap(layer, x.clone().requires_grad_()).square().sum().backward()
            results.append([parameter.grad.clone() for parameter in layer.parameters()])
    for plain, again in zip(results[:3], results[3:], strict=True):
        assert all(torch.equal(first, second) for first, second in zip(plain, again, strict=True))
