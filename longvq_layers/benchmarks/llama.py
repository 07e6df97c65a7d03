"""A rotary model beyond its training length: a byte Llama with its own attention, a window alone, and replaced.

Trains the model (4 layers, width 192, grouped queries, 512 bytes of source at a time; kept in --model), replaces its
attention with every setting, and prints bits per byte of the last 256 bytes of texts of several lengths. With
--fine-tune it then trains the replaced model and the one with a window alone on longer texts that ask, beyond the
window, for a word that stood at the front, one of 16, and prints what they know of it. Writes results.csv and a plot.
"""

import argparse
import copy
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from longvq_layers.benchmarks import byte_llama, results
from longvq_layers.replace import replace_attention

_LAST = 256  # bytes that count
_CALIBRATION = 48  # texts of the training length
_FINE_LENGTH, _FINE_BATCH, _FINE_RATE = 1024, 8, 1e-3
_FINE_WINDOW, _ASKED = 64, 100  # bytes from one question to the next: more than the window


@dataclass(frozen=True)
class Row:
    """One attention at one length."""

    attention: str
    text: str  # "source" or "key"
    length: int
    bits_per_byte: float
    fine_tuned: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, default=Path("byte_llama"), metavar="DIR", help="default %(default)s")
    parser.add_argument("--steps", type=int, default=1200, help="of training the model, default %(default)s")
    parser.add_argument("--fine-tune", type=int, default=0, metavar="N", help="steps, default none")
    lengths = [512, 2048, 4096]
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths, metavar="L", help="default %(default)s")
    parser.add_argument("--texts", type=int, default=32, help="of each length, default %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default %(default)s")
    parser.add_argument("--out", type=Path, default=Path("llama_benchmark"), metavar="DIR", help="default %(default)s")


def run(args: argparse.Namespace) -> None:
    if min(args.steps, args.texts, args.threads, *args.lengths) < 1 or min(args.lengths) < _LAST or args.fine_tune < 0:
        sys.exit(
            f"--steps, --texts and --threads must be at least 1, --lengths at least {_LAST}, --fine-tune at least 0"
        )
    torch.set_num_threads(args.threads)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    model = byte_llama.trained(args.model, args.steps, say)
    texts = {("source", length): byte_llama.windows(length, args.texts) for length in args.lengths}
    texts |= {("key", length): byte_llama.recall(length, args.texts, "val", 0) for length in args.lengths}
    count = sum(p.numel() for p in model.parameters())
    print(
        f"{results.machine(args.threads)}; a byte Llama of {count:,} parameters, {args.texts} texts of each length.\n"
    )
    rows = []
    for name, swapped in _attentions(model):
        say(f"{name} …")
        rows += _measure(name, swapped, texts, fine_tuned=False)
    print("\n".join(_table(rows, "source", args.lengths)), flush=True)
    if args.fine_tune:
        for name, swapped in (
            (f"window {_FINE_WINDOW} alone", byte_llama.window_only(model, _FINE_WINDOW)),
            _replaced(model, 512, _FINE_WINDOW),
        ):
            say(f"fine-tuning: {name} …")
            start = time.perf_counter()
            byte_llama.train(swapped, _fine_batch, args.fine_tune, lr=_FINE_RATE, say=say)
            say(f"{time.perf_counter() - start:.0f} s")
            rows += _measure(name, swapped, texts, fine_tuned=True)
        print(f"\nAfter {args.fine_tune} steps of {_FINE_BATCH} x {_FINE_LENGTH} bytes:\n")
        tuned = [row for row in rows if row.fine_tuned]
        for text in ("source", "key"):
            print("\n".join(_table(tuned, text, args.lengths)) + "\n", flush=True)
    results.write("llama", args.out, rows, threads=args.threads, torch=torch.__version__)


def _attentions(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield "its own", model
    for window in (64, 256):
        yield f"window {window} alone", byte_llama.window_only(model, window)
    yield _replaced(model, 512, 256, far_positions="rotated")
    for codes, window in ((64, 64), (512, 64), (64, 256), (512, 256)):
        yield _replaced(model, codes, window)


def _replaced(model: nn.Module, codes: int, window: int, **options) -> tuple[str, nn.Module]:
    swapped = copy.deepcopy(model)
    calibration = list(byte_llama.windows(byte_llama.TRAINED_LENGTH, _CALIBRATION, "train")[:, :-1].split(8))
    replace_attention(swapped, num_codes=codes, window=window, calibration=calibration, **options)
    return f"{options.get('far_positions', 'rectified')}, {codes} codes, window {window}", swapped


def _fine_batch(step: int) -> Tensor:
    return byte_llama.recall(_FINE_LENGTH, _FINE_BATCH, "train", step, _ASKED)


def _measure(name: str, model: nn.Module, texts: dict, *, fine_tuned: bool) -> list[Row]:
    return [
        Row(
            name,
            text,
            length,
            byte_llama.bits(model, tokens, _LAST if text == "source" else byte_llama.KEY),
            fine_tuned,
        )
        for (text, length), tokens in texts.items()
    ]


def _table(rows: list[Row], text: str, lengths: list[int]) -> list[str]:
    what = f"last {_LAST} bytes" if text == "source" else "the key"
    lines = [f"| attention, bits per byte of {what} | " + " | ".join(f"{length:,}" for length in lengths) + " |"]
    lines.append("|:---|" + "---:|" * len(lengths))
    chosen = [row for row in rows if row.text == text]
    for name in dict.fromkeys(row.attention for row in chosen):
        values = [
            row.bits_per_byte for length in lengths for row in chosen if (row.attention, row.length) == (name, length)
        ]
        lines.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    return lines
