"""The ways to calibrate that the benchmark of quality compares: `replace_attention` with some of its parts disabled."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor

from longvq_layers.replace.calibration import recorder as recording
from longvq_layers.replace.slot.swapped import SwappedAttention

# Each method has all parts of the method before it, and one more: the metric of the queries; a correction by the
# variance of a code; a gain on that correction per head; keys weighted by the attention that they receive; codes that
# stand for means of the sequence's own keys; codes divided among the layers by need.
METHODS = (
    "k-means",
    "+ query metric",
    "+ variance",
    "+ gain per head",
    "+ attention received",
    "+ means of the sequence",
    "+ codes balanced",
)
DEFAULT = "+ means of the sequence"  # what replace_attention does
DISTILLED = "+ distillation"  # of the default


def has(method: str, part: str) -> bool:
    """Whether a method includes a part."""
    return METHODS.index(method) >= METHODS.index(part)


@contextlib.contextmanager
def working_by(method: str) -> Iterator[None]:
    """Disable the parts of `replace_attention` that the method does not include."""
    fit, choices = recording.fit, recording.GAINS if has(method, "+ gain per head") else (1.0,)

    def fit_by(recorder: recording.Recorder, attention: SwappedAttention) -> None:
        if not has(method, "+ query metric") and recorder.moment is not None:
            recorder.moment = torch.eye(recorder.moment.shape[-1]).double().expand_as(recorder.moment)
        if not has(method, "+ attention received"):
            recorder.weight = None
        fit(recorder, attention)

    with contextlib.ExitStack() as parts:
        parts.enter_context(mock.patch.object(recording, "fit", fit_by))
        parts.enter_context(mock.patch.object(recording, "GAINS", choices))
        if not has(method, "+ means of the sequence"):
            parts.enter_context(mock.patch.object(SwappedAttention, "_sequence_codewords", _codewords_of_codebook))
        yield


def _codewords_of_codebook(
    attention: SwappedAttention, keys: Tensor, codes: Tensor, table: Tensor, padding: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Codewords (B, Hkv, S, D) and their spread (B, Hkv, S), the same for every sequence, as in causal attention."""
    codewords = table @ attention.from_metric
    return codewords.expand(len(keys), -1, -1, -1), attention.spread.expand(len(keys), -1, -1)
