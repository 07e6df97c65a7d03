"""Attention over quantised keys on the CPU against fused scaled_dot_product_attention: time, memory, break-even length.

Our times include the assignment of keys to codes and the sums by code. Prints Markdown, writes results.csv and
attention.png.
"""

import argparse
import sys

import torch

from longvq_layers.benchmarks.attention import measure, plot, report
from longvq_layers.benchmarks.attention.problem import FULL, QUICK
from longvq_layers.benchmarks.common import arguments, results
from longvq_layers.ops._dispatch import BACKENDS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    cases = measure.CASES
    arguments.add_quick(parser)
    parser.add_argument("--cases", nargs="+", choices=cases, default=list(cases), help="default: all")
    arguments.add_repeats(parser, 7)
    arguments.add_threads(parser, 2)
    arguments.add_out(parser, "attention_benchmark")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="what is measured, default %(default)s")
    parser.add_argument(
        "--budget", type=float, default=15.0, metavar="S", help="seconds; a slower method gets 3 rounds, default 15"
    )
    parser.add_argument(
        "--longest-call", type=float, default=30.0, metavar="S", help="the sweep leaves out slower calls of the peer"
    )


def run(args: argparse.Namespace) -> None:
    if args.repeats < 1 or args.threads < 1:
        sys.exit("--repeats and --threads must be at least 1")
    torch.set_num_threads(args.threads)
    sizes = QUICK if args.quick else FULL
    print(
        f"{results.machine(args.threads)}; ours is backend={args.backend!r}; float32, B = 1, {sizes.num_heads} heads "
        f"of {sizes.head_dim}, S = {sizes.num_codes}; bidirectional: no window, causal: a window of {sizes.window} "
        f"with a bias; assignment included; medians of {args.repeats} interleaved rounds unless said otherwise.\n"
    )
    wanted = measure.Run(sizes, args.backend, args.threads, args.repeats, args.budget, args.longest_call, args.cases)
    try:
        rows = list(measure.measure(wanted))
    except NotImplementedError as error:
        sys.exit(f"there is nothing to measure: {error}")
    report.print_report(rows, sizes, judged=not args.quick)
    everywhere = {
        "B": 1,
        "heads": sizes.num_heads,
        "width": sizes.head_dim,
        "codes": sizes.num_codes,
        "window": sizes.window,
        "threads": args.threads,
        "torch": torch.__version__,
    }
    results.write("attention", args.out, rows, plot.panels(rows), **everywhere)
