"""Checkpoints, copies and dtypes of the codebook."""

import copy
import pickle

import pytest
import torch

from longvq_layers.layers import Codebook, VQAttention


def learned(steps=3):
    book = Codebook(2, 5, 4)
    for _ in range(steps):
        book(torch.randn(3, 2, 20, 4))
    return book


def test_training_resumes_exactly():
    book = learned()
    other = Codebook(2, 5, 4)
    other.load_state_dict(copy.deepcopy(book.state_dict()))
    for _ in range(3):
        k = torch.randn(3, 2, 20, 4)
        for each in (book, other):
            torch.manual_seed(9)
            each(k)
    for name, value in book.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_after_loading_an_untrained_checkpoint_k_means_runs_again():
    book = learned()
    book.load_state_dict(Codebook(2, 5, 4).state_dict())
    far = 1000 + torch.randn(3, 2, 20, 4)
    book(far)
    assert bool(book.initialized) and book.embedding.min() > 900


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("steps", [0, 2])
def test_copies_keep_the_initialised_flag(how, steps):
    clone = how(learned(steps))
    assert bool(clone.initialized) == clone._ready == (steps > 0)


@pytest.mark.parametrize("name", ["embedding", "ema_sum", "ema_count"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_checkpoint_with_nan_is_refused_by_name(name, bad):
    layer = VQAttention(8, 2, num_codes=5)
    state = copy.deepcopy(layer.state_dict())
    state[f"attention.codebook.{name}"].view(-1)[1] = bad
    with pytest.raises(ValueError, match=rf"attention\.codebook\.{name} must be finite, got NaN or infinity"):
        layer.load_state_dict(state)


def test_a_bare_table_of_codes_becomes_an_initialised_codebook():
    table = torch.randn(2, 5, 4)
    book = Codebook(2, 5, 4)
    book.load_state_dict({"embedding": table})
    assert bool(book.initialized) and torch.equal(book.embedding, table)
    book(torch.randn(3, 2, 20, 4))
    assert torch.allclose(book.embedding, table, atol=1e-3)
    truncated = learned().state_dict()
    del truncated["ema_sum"]
    with pytest.raises(RuntimeError, match="ema_sum"):
        book.load_state_dict(truncated)


def test_precision_of_buffers():
    book = learned()
    before = book.embedding.clone()
    for convert in (lambda b: b.half(), lambda b: b.bfloat16(), lambda b: b.to(torch.float16)):
        convert(book)
        assert torch.equal(book.embedding, before) and book.ema_count.dtype == torch.float32
        assert book.idle.dtype == torch.int64
    assert book.double().embedding.dtype == torch.float64
    book(torch.randn(3, 2, 20, 4, dtype=torch.float64))
    assert book.half().embedding.dtype == torch.float32
    assert Codebook(1, 2, 3, dtype=torch.float64).ema_sum.dtype == torch.float64
    assert Codebook(1, 2, 3, dtype=torch.bfloat16).ema_sum.dtype == torch.float32


def test_meta_then_empty_then_reset():
    book = Codebook(2, 5, 4, device="meta")
    assert all(buffer.is_meta for buffer in book.buffers())
    book.to_empty(device="cpu").reset_parameters()
    assert not book.initialized
    book(torch.randn(3, 2, 20, 4))
    assert bool(book.initialized) and book.embedding.isfinite().all()


def test_compiled_training_after_the_first_step():
    book = learned(steps=1)
    eager = copy.deepcopy(book)
    compiled = torch.compile(book, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        k = torch.randn(3, 2, 20, 4)
        assert torch.equal(compiled(k), eager(k))
    assert torch.allclose(book.ema_sum, eager.ema_sum)


def test_compiling_before_the_first_step_says_what_to_do():
    compiled = torch.compile(Codebook(2, 5, 4), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="run one training step before compiling"):
        compiled(torch.randn(3, 2, 20, 4))
