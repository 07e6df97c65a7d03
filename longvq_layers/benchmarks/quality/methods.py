"""The ways to calibrate that the benchmark of quality compares: `replace_attention` with some of its parts disabled."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor

from longvq_layers.replace import calibration as calibrating
from longvq_layers.replace._swapped import SwappedAttention

# Each method adds its part to those of the method before: the metric of the queries; a correction by the variance of a
# code; a gain on that correction per head; keys weighted by the attention that they receive; codes that stand for means
# of the sequence's own keys; codes divided among the layers by need.
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
    fit, choices = calibrating.fit, calibrating.GAINS if has(method, "+ gain per head") else (1.0,)

    def fit_by(recorder: calibrating.Recorder, attention: SwappedAttention) -> None:
        if not has(method, "+ query metric") and recorder.moment is not None:
            recorder.moment = torch.eye(recorder.moment.shape[-1]).double().expand_as(recorder.moment)
        if not has(method, "+ attention received"):
            recorder.weight = None
        fit(recorder, attention)

    with contextlib.ExitStack() as parts:
        parts.enter_context(mock.patch.object(calibrating, "fit", fit_by))
        parts.enter_context(mock.patch.object(calibrating, "GAINS", choices))
        if not has(method, "+ means of the sequence"):
            parts.enter_context(mock.patch.object(SwappedAttention, "_of_sequence", _of_codebook))
        yield


def _of_codebook(attention: SwappedAttention, keys: Tensor, codes: Tensor, table: Tensor, padding: Tensor) -> Tensor:
    """(B, Hkv, S, D + 1), the same codewords for every sequence, as in causal attention."""
    codebook = attention._spread_out(table @ attention.from_metric, attention.spread)
    return codebook.expand(len(keys), -1, -1, -1)
