"""Compare blocks on a task: `python -m longvq_layers.experiments recall`.

All variants of a suite get the same data in the same order, the same number of steps and about as many parameters.
Finished runs are not repeated, and a killed run continues. Prints a Markdown table and draws the curves.
"""

import argparse
import signal
import sys
from pathlib import Path

from longvq_layers.experiments import report
from longvq_layers.experiments.runner import run_all
from longvq_layers.experiments.suites import SUITES
from longvq_layers.experiments.timing import step_times


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m longvq_layers.experiments", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("suite", choices=tuple(SUITES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default 0 1 2")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each; default %(default)s")
    parser.add_argument("--out", type=Path, help="folder of the runs, default experiments/SUITE")
    args = parser.parse_args(arguments)
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    suite, out = SUITES[args.suite](), args.out or Path("experiments") / args.suite
    run_all(suite, out, args.seeds, args.jobs, lambda line: print(line, file=sys.stderr, flush=True))
    print(f"{suite.about}.\n\n{report.markdown(suite, report.collect(suite, out, args.seeds, step_times(suite)))}")
    report.draw(suite, out, args.seeds, out / f"{args.suite}.png")
    print(f"\nWritten: {out / f'{args.suite}.png'}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the runs as well
    main()
