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

import torch

from longvq_layers.benchmarks.common import arguments, plot, results
from longvq_layers.benchmarks.common.markdown import line
from longvq_layers.benchmarks.common.memory import NOT_READABLE
from longvq_layers.benchmarks.common.results import say
from longvq_layers.benchmarks.common.timing import interleaved_times
from longvq_layers.benchmarks.step import memory
from longvq_layers.benchmarks.step.models import MODELS, OURS, Sizes, build
from longvq_layers.layers import commitment_loss, optimizer_groups
from longvq_layers.models import SequenceClassifier

# (peer, length) -> least speed-up, and how many times less memory
SPEED_TARGETS = {("dense", 4096): 5.3, ("fused", 4096): 2.0, ("fused", 16384): 6.0}
MEMORY_TARGETS = {("dense", 4096): 10.0}
_BUDGET = 60.0  # seconds of one model at one length; a slower model is timed in three rounds
_COLOURS = {"longvq": plot.OURS, "longvq, recompute": plot.PURPLE, "fused": plot.AMBER, "dense": plot.GREY}


@dataclass(frozen=True)
class Row:
    """One model at one length."""

    L: int
    model: str
    parameters: int
    seconds: float  # median of one step
    rounds: int
    peak_bytes: int | None  # of forward and backward, without parameters, inputs and the state of the optimiser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384], metavar="L")
    parser.add_argument("--dense-up-to", type=int, default=4096, metavar="L", help="default %(default)s")
    parser.add_argument("--d-model", type=int, default=256, help="default %(default)s")
    parser.add_argument("--depth", type=int, default=4, help="default %(default)s")
    parser.add_argument("--codes", type=int, default=256, help="default %(default)s")
    parser.add_argument("--window", type=int, default=64, help="default %(default)s")
    arguments.add_repeats(parser, 5)
    arguments.add_threads(parser)
    arguments.add_out(parser, "step_benchmark")


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
    results.write("step", args.out, rows, _panels(rows), threads=args.threads, torch=torch.__version__)


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
    sizes = Sizes(args.d_model, args.depth, args.codes, args.window)
    say(f"L = {length} …")
    models = {name: build(name, sizes) for name in names}
    parameters = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    steps = {name: training_step(model.train(), length) for name, model in models.items()}
    times = interleaved_times(steps, args.repeats, _BUDGET)
    peaks = {name: memory.peak_of_step(name, sizes, length, args.threads) for name in names}
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
        peak = NOT_READABLE if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}"
        against = (", ".join(map(_times, _factors(row, by[ours, row.L]))) for ours in OURS)
        lines.append(line(row.L, row.model, f"{row.parameters:,}", f"{row.seconds:.3f}", peak, *against))
    judged = []
    for kind, (what, targets) in enumerate((("time", SPEED_TARGETS), ("memory", MEMORY_TARGETS))):
        for (peer, length), least in targets.items():
            if (peer, length) in by:
                factors = [_factors(by[peer, length], by[ours, length])[kind] for ours in OURS]
                cells = (_judged(factor, least) for factor in factors)
                judged.append(line(f"{what} against {peer}, L = {length}", f"≥ {least:g}x", *cells))
    if judged:
        lines += ["", "| target | asked | longvq | longvq, recompute |", "|:---|---:|:---|:---|", *judged]
    return [*lines, ""]


def _factors(peer: Row, ours: Row) -> tuple[float, float | None]:
    """How many times our time and our memory the peer needs."""
    memory = None
    if peer.peak_bytes is not None and ours.peak_bytes is not None:
        memory = peer.peak_bytes / ours.peak_bytes
    return peer.seconds / ours.seconds, memory


def _times(factor: float | None) -> str:
    return NOT_READABLE if factor is None else f"{factor:.2f}x"


def _judged(factor: float | None, least: float) -> str:
    return _times(factor) + ("" if factor is None else f", {results.met(factor >= least)}")


def _panels(rows: list[Row]) -> list[plot.Panel]:
    """A panel of seconds and one of memory, over the length."""
    seconds, megabytes = {}, {}
    for model, colour in _COLOURS.items():
        timed = [row for row in rows if row.model == model]
        seconds[model] = plot.Line([row.L for row in timed], [row.seconds for row in timed], colour)
        peaks = [(row.L, row.peak_bytes * 1e-6) for row in timed if row.peak_bytes]
        megabytes[model] = plot.Line([x for x, _ in peaks], [y for _, y in peaks], colour)
    return [
        plot.lines(seconds, "seconds a step", logarithmic=True),
        plot.lines(megabytes, "peak memory, MB", logarithmic=True),
    ]
