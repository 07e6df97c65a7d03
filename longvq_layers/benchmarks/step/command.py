"""One training step of a byte classifier: LongVQ blocks against a Transformer with dense and with fused attention.

The models are `models.SequenceClassifier`s that differ in their blocks alone: the same width, depth, batch, loss and
optimiser, and by default about as many parameters. LongVQ blocks are timed keeping all activations and with
`recompute=True`. A step is forward, backward and an AdamW step. Prints Markdown, writes results.csv and step.png.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from longvq_layers.benchmarks import results, step_memory
from longvq_layers.benchmarks.timing import interleaved_times
from longvq_layers.layers import commitment_loss, optimizer_groups
from longvq_layers.models import SequenceClassifier, SequenceEncoder

# name -> block and its options; the feed-forward width makes the sizes equal
MODELS: dict[str, tuple[str, dict]] = {
    "longvq": ("longvq", {"d_ff": 512}),
    "longvq, recompute": ("longvq", {"d_ff": 512, "recompute": True}),
    "fused": ("transformer", {"d_ff": 1024}),
    "dense": ("transformer", {"d_ff": 1024, "attention": "dense"}),
}
OURS = ("longvq", "longvq, recompute")
# (peer, length) -> least speed-up, and how many times less memory
SPEED_TARGETS = {("dense", 4096): 5.3, ("fused", 4096): 2.0, ("fused", 16384): 6.0}
MEMORY_TARGETS = {("dense", 4096): 10.0}
_BUDGET = 60.0  # seconds of one model at one length; beyond it it takes part in three rounds only
_CLASSES = 10


@dataclass(frozen=True)
class Row:
    """One model at one length."""

    L: int
    model: str
    parameters: int
    seconds: float  # median of one step
    rounds: int
    peak_bytes: int | None  # above what the process holds before its first step, without parameters and inputs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384], metavar="L")
    parser.add_argument("--dense-up-to", type=int, default=4096, metavar="L", help="default %(default)s")
    parser.add_argument("--d-model", type=int, default=256, help="default %(default)s")
    parser.add_argument("--depth", type=int, default=4, help="default %(default)s")
    parser.add_argument("--codes", type=int, default=256, help="default %(default)s")
    parser.add_argument("--window", type=int, default=64, help="default %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, default %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default %(default)s")
    parser.add_argument("--out", type=Path, default=Path("step_benchmark"), metavar="DIR", help="default %(default)s/")


def run(args: argparse.Namespace) -> None:
    if min(args.repeats, args.threads, *args.lengths) < 1:
        sys.exit("--repeats, --threads and --lengths must be at least 1")
    torch.set_num_threads(args.threads)
    print(
        f"{results.machine(args.threads)}; float32, batch 1, {args.depth} blocks, d_model = {args.d_model}, "
        f"{args.codes} codes, window {args.window}, medians of {args.repeats} interleaved rounds or three.\n"
    )
    rows = [row for length in args.lengths for row in _measure(length, args)]
    print("\n".join(_report(rows)), flush=True)
    results.write("step", args.out, rows, threads=args.threads, torch=torch.__version__)


def build(name: str, d_model: int, depth: int, codes: int, window: int) -> SequenceClassifier:
    """The model of that name: a byte classifier."""
    torch.manual_seed(0)
    block, options = MODELS[name]
    options = {**options, "d_ff": options["d_ff"] * d_model // 256}
    if block == "longvq":
        options |= {"num_codes": codes, "window": window}
    encoder = SequenceEncoder(num_inputs=256, d_model=d_model, depth=depth, block=block, block_options=options)
    return SequenceClassifier(encoder, _CLASSES)


def training_step(model: SequenceClassifier, length: int) -> Callable[[], None]:
    """A function that takes one step on a fixed text of random bytes."""
    inputs, target = torch.randint(256, (1, length)), torch.zeros(1, dtype=torch.int64)
    optimizer = torch.optim.AdamW(optimizer_groups(model, lr=1e-3, weight_decay=0.01))

    def step() -> None:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(inputs), target) + commitment_loss(model)
        loss.backward()
        optimizer.step()

    return step


def _measure(length: int, args: argparse.Namespace) -> list[Row]:
    names = [name for name in MODELS if name != "dense" or length <= args.dense_up_to]
    sizes = (args.d_model, args.depth, args.codes, args.window)
    print(f"L = {length} …", file=sys.stderr, flush=True)
    models = {name: build(name, *sizes) for name in names}
    parameters = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    steps = {name: training_step(model.train(), length) for name, model in models.items()}
    times = interleaved_times(steps, args.repeats, _BUDGET)
    peaks = {name: step_memory.peak_of_step(name, sizes, length, args.threads) for name in names}
    return [
        Row(length, name, parameters[name], statistics.median(times[name]), len(times[name]), peaks[name])
        for name in names
    ]


def _report(rows: list[Row]) -> list[str]:
    by = {(row.model, row.L): row for row in rows}
    lines = [
        "| L | model | parameters | seconds a step | peak MB | LongVQ: faster by, less memory by | with recompute |",
        "|---:|:---|---:|---:|---:|:---|:---|",
    ]
    for row in rows:
        peak = "not readable here" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}"
        against = (", ".join(map(_factor, _factors(row, by[ours, row.L]))) for ours in OURS)
        lines.append(
            f"| {row.L} | {row.model} | {row.parameters:,} | {row.seconds:.3f} | {peak} | {' | '.join(against)} |"
        )
    judged = []
    for kind, (what, targets) in enumerate((("time", SPEED_TARGETS), ("memory", MEMORY_TARGETS))):
        for (peer, length), least in targets.items():
            if (peer, length) in by:
                factors = [_factors(by[peer, length], by[ours, length])[kind] for ours in OURS]
                cells = " | ".join(_factor(factor, least) for factor in factors)
                judged.append(f"| {what} against {peer}, L = {length} | ≥ {least:g}x | {cells} |")
    if judged:
        lines += ["", "| target | asked | longvq | longvq, recompute |", "|:---|---:|:---|:---|", *judged]
    return [*lines, ""]


def _factors(peer: Row, ours: Row) -> tuple[float, float | None]:
    # How many times the time and the memory of ours the peer takes.
    memory = None if peer.peak_bytes is None else peer.peak_bytes / ours.peak_bytes
    return peer.seconds / ours.seconds, memory


def _factor(factor: float | None, least: float | None = None) -> str:
    if factor is None:
        return "not readable here"
    return f"{factor:.2f}x" + ("" if least is None else f", {results.met(factor >= least)}")
