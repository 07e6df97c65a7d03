"""A rotary model beyond its training length: a byte Llama with its own attention, a window alone, and replaced.

Trains the model (4 layers, width 192, grouped queries, 512 bytes at a time; kept in --model) and replaces its attention
with every setting. For texts of several lengths it prints bits per byte of the last 256 bytes of source, and the share
of keys that the model recalls. A key is one of 16 bytes: a text gives it near the beginning and asks for it at the end.
With --fine-tune it then trains the replaced model, and a model with the window alone, on texts of twice the length.
Writes results.csv and a plot.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from longvq_layers.benchmarks.common import arguments, plot, results
from longvq_layers.benchmarks.common.markdown import line
from longvq_layers.benchmarks.common.results import say
from longvq_layers.benchmarks.llama import model as byte_llama
from longvq_layers.benchmarks.llama import texts
from longvq_layers.replace import replace_attention

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

_LAST = 256  # bytes of a source text that count
_CALIBRATION = 48  # texts of the training length
_FINE_LENGTH, _FINE_RATE = 1024, 5e-4
_FINE_CODES, _FINE_WINDOW = 512, 256


@dataclass(frozen=True)
class Row:
    """One attention at one length."""

    attention: str
    text: str  # "source" or "key"
    length: int
    bits_per_byte: float
    right: float  # share of texts whose last bytes are all right
    fine_tuned: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, default=Path("byte_llama"), metavar="DIR", help="default %(default)s")
    parser.add_argument("--steps", type=int, default=1000, help="of training the model, default %(default)s")
    parser.add_argument("--fine-tune", type=int, default=0, metavar="N", help="steps, default none")
    lengths = [512, 2048, 4096]
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths, metavar="L", help="default %(default)s")
    parser.add_argument("--texts", type=int, default=32, help="of each length, default %(default)s")
    arguments.add_threads(parser)
    arguments.add_out(parser, "llama_benchmark")


def run(args: argparse.Namespace) -> None:
    if min(args.steps, args.texts, args.threads, *args.lengths) < 1 or min(args.lengths) < _LAST or args.fine_tune < 0:
        sys.exit(
            f"--steps, --texts and --threads must be at least 1, --lengths at least {_LAST}, --fine-tune at least 0"
        )
    torch.set_num_threads(args.threads)
    model = byte_llama.trained(args.model, args.steps, say)
    measured = {("source", length): texts.windows(length, args.texts) for length in args.lengths}
    measured |= {("key", length): texts.recall(length, args.texts, "val", 0, asked=1) for length in args.lengths}
    count = sum(p.numel() for p in model.parameters())
    print(
        f"{results.machine(args.threads)}; a byte Llama of {count:,} parameters, {args.texts} texts of each length.\n"
    )
    rows: list[Row] = []
    for name, swapped in _attentions(model):
        say(f"{name} …")
        rows += _measure(name, swapped, measured, fine_tuned=False)
    print(_tables(rows, args.lengths), flush=True)
    if args.fine_tune:
        for name, swapped in (
            (f"window {_FINE_WINDOW} alone", byte_llama.window_only(model, _FINE_WINDOW)),
            _replaced(model, _FINE_CODES, _FINE_WINDOW),
        ):
            say(f"fine-tuning: {name} …")
            start = time.perf_counter()
            byte_llama.train(swapped, _fine_batch, args.fine_tune, lr=_FINE_RATE, say=say)
            say(f"{time.perf_counter() - start:.0f} s")
            rows += _measure(name, swapped, measured, fine_tuned=True)
        print(f"After {args.fine_tune} steps of 8 x {_FINE_LENGTH} bytes:\n")
        print(_tables([row for row in rows if row.fine_tuned], args.lengths), flush=True)
    results.write("llama", args.out, rows, _panels(rows), threads=args.threads, torch=torch.__version__)


def _attentions(model: "LlamaForCausalLM") -> Iterator[tuple[str, nn.Module]]:
    yield "its own", model
    for window in (64, 256):
        yield f"window {window} alone", byte_llama.window_only(model, window)
    yield _replaced(model, 512, 256, far_positions="rotated")
    for codes, window in ((64, 64), (512, 64), (64, 256), (512, 256)):
        yield _replaced(model, codes, window)


def _replaced(model: nn.Module, num_codes: int, window: int, far_positions: str = "rectified") -> tuple[str, nn.Module]:
    swapped = copy.deepcopy(model)
    calibration = list(texts.windows(byte_llama.TRAINED_LENGTH, _CALIBRATION, "train")[:, :-1].split(8))
    replace_attention(swapped, num_codes=num_codes, window=window, calibration=calibration, far_positions=far_positions)
    return f"{far_positions}, {num_codes} codes, window {window}", swapped


def _fine_batch(step: int) -> Tensor:
    return texts.mixed(_FINE_LENGTH, step)


def _measure(name: str, model: nn.Module, measured: Mapping[tuple[str, int], Tensor], *, fine_tuned: bool) -> list[Row]:
    rows = []
    for (text, length), tokens in measured.items():
        bits, right = byte_llama.score(model, tokens, _LAST if text == "source" else 1)
        rows.append(Row(name, text, length, bits, right, fine_tuned))
    return rows


def _tables(rows: list[Row], lengths: list[int]) -> str:
    source = _table(
        rows, "source", f"bits per byte of the last {_LAST}", lengths, lambda row: f"{row.bits_per_byte:.3f}"
    )
    key = _table(rows, "key", "keys recalled", lengths, lambda row: f"{row.right:.0%}")
    return "\n".join([*source, "", *key, ""])


def _table(rows: list[Row], text: str, what: str, lengths: list[int], value: Callable[[Row], str]) -> list[str]:
    lines = [line(f"attention, {what}", *(f"{length:,}" for length in lengths))]
    lines.append("|:---|" + "---:|" * len(lengths))
    chosen = [row for row in rows if row.text == text]
    for name in _names(chosen):
        values = [value(row) for length in lengths for row in chosen if (row.attention, row.length) == (name, length)]
        lines.append(line(name, *values))
    return lines


def _names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.attention for row in rows))


def _panels(rows: list[Row]) -> list[plot.Panel]:
    """A panel of source, one of keys and, after fine-tuning, one more of keys."""
    before, after = ([row for row in rows if row.fine_tuned == tuned] for tuned in (False, True))
    panels = [
        _panel(before, "source", "bits per byte", lambda row: row.bits_per_byte),
        _panel(before, "key", "keys recalled", lambda row: row.right),
    ]
    if after:
        panels.append(_panel(after, "key", "keys recalled, fine-tuned", lambda row: row.right))
    return panels


def _panel(rows: list[Row], text: str, label: str, value: Callable[[Row], float]) -> plot.Panel:
    lines = {}
    for name in _names(rows):
        chosen = [row for row in rows if (row.attention, row.text) == (name, text)]
        lines[name] = plot.Line([row.length for row in chosen], [value(row) for row in chosen])
    return plot.lines(lines, label, title=text, legend_size=7)
