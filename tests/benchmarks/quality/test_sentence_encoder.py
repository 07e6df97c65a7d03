"""The sentence encoder of the benchmark of quality and of the demo."""

import pytest
import torch

pytest.importorskip("transformers")

from longvq_layers.benchmarks.common.errors import UserError
from longvq_layers.benchmarks.quality import sentence_encoder as encoder
from tests.benchmarks.quality import small_encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_encoder.save(tmp_path_factory.mktemp("model"))


def test_embeddings_ignore_padding(folder):
    model, tokenizer = encoder.load(folder)
    texts = ["the return of a", "if a is the return to the return of the " * 3]
    together = encoder.embed(model, encoder.batches(tokenizer, texts, 32, 2))
    alone = encoder.embed(model, encoder.batches(tokenizer, texts, 32, 1))
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_nearest_is_another_document():
    embeddings = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    assert encoder.nearest(embeddings).tolist() == [1, 0, 1]


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        encoder.load(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(UserError, match="has no tokenizer"):
        encoder.load(tmp_path)
