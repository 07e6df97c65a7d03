"""Every model type of the installed transformers: built tiny, replaced, compared; prints a Markdown table.

A type counts as "replaced and equal" if the replaced model equals the dense definition and, with a window as long as
the sequence, the original model; without and with padding, and through its cache. Weights are random; no speed is
measured.
"""

import argparse
import contextlib
import io
import signal
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from longvq_layers.benchmarks.architectures.verdict import BUG, EQUAL, NOT_BUILT, REFUSED, Verdict, in_short, verdict
from longvq_layers.benchmarks.common import arguments
from longvq_layers.benchmarks.common.markdown import line
from longvq_layers.benchmarks.common.results import say

KINDS = (EQUAL, REFUSED, NOT_BUILT, BUG)


@dataclass
class Row:
    """One model type."""

    model_type: str
    model_class: str
    verdict: Verdict
    seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--types", nargs="+", metavar="TYPE", help="model types, default all of transformers")
    parser.add_argument("--seconds", type=int, default=12, help="processor time for one type, default %(default)s")
    arguments.add_threads(parser, 1)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table there too")


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    rows = []
    for row in sweep(args.types, args.seconds):
        rows.append(row)
        say(f"{row.seconds:5.1f} s  {row.model_type}: {row.verdict.kind} {row.verdict.detail}")
    text = table(rows)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


def sweep(types: Iterable[str] | None = None, seconds: int = 12) -> Iterator[Row]:
    """The verdict of each model type; default all, in alphabetical order.

    Args:
        types: model types as in `config.model_type`.
        seconds: processor time for one type.

    Raises:
        ValueError: a type that the installed transformers doesn't have.
    """
    known = model_types()
    for model_type in known if types is None else types:
        if model_type not in known:
            raise ValueError(
                f"sweep: types must be model types of the installed transformers, which has {len(known)}, got "
                f"{model_type!r}"
            )
        start = time.perf_counter()
        with _quiet():
            name, result = _verdict(model_type, seconds)
        yield Row(model_type, name, result, time.perf_counter() - start)


def model_types() -> list[str]:
    """Every model type that has a model class."""
    from transformers.models.auto import modeling_auto as auto

    return sorted({*auto.MODEL_MAPPING_NAMES, *auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES})


def _classes(model_type: str) -> Iterator[tuple[type, type]]:
    """The config class with the base class, then with the causal language model."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto as auto

    config_class = CONFIG_MAPPING[model_type]
    for mapping in (auto.MODEL_MAPPING, auto.MODEL_FOR_CAUSAL_LM_MAPPING):
        if config_class in mapping:
            found = mapping[config_class]
            model_class = found[0] if isinstance(found, (tuple, list)) else found
            if model_class is not None:
                yield config_class, model_class


def _verdict(model_type: str, seconds: int) -> tuple[str, Verdict]:
    name, first = model_type, Verdict(NOT_BUILT, "no class was found")
    try:
        with _time_limit(seconds):
            for number, (config_class, model_class) in enumerate(_classes(model_type)):
                result = verdict(config_class, model_class)
                if number == 0 or result.kind != NOT_BUILT:
                    name, first = model_class.__name__, result
                if result.kind != NOT_BUILT:
                    break
    except _TimeUp:
        first = Verdict(NOT_BUILT, f"it takes more than {seconds} s")
    except Exception as error:  # an import that needs another package
        first = Verdict(NOT_BUILT, in_short(error))
    return name, first


class _TimeUp(BaseException):
    """The time limit is over; not an Exception, so that no `except Exception` on the way catches it."""


@contextlib.contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    # Processor time, so that the verdicts do not depend on the load of the machine.
    def ring(*args: object) -> None:
        raise _TimeUp

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


def table(rows: list[Row]) -> str:
    """Markdown: one line for each result with its model types, and a line of counts.

    (n of m) after a type: n of the m attention modules that the inputs reach were replaced. It is absent where n = m.
    """
    import transformers

    lines = ["| model types | classes | result |", "|:---|:---|:---|"]
    for kind in KINDS:
        groups: dict[str, list[Row]] = {}
        for row in (row for row in rows if row.verdict.kind == kind):
            groups.setdefault(_text(row.verdict), []).append(row)
        for text, group in sorted(groups.items(), key=lambda item: -len(item[1])):
            types, classes = ", ".join(map(_name, group)), ", ".join(row.model_class for row in group)
            lines.append(line(types, classes, text.replace("|", "/")))
    counts = ", ".join(f"{sum(row.verdict.kind == kind for row in rows)} {kind}" for kind in KINDS)
    replaced, seconds = sum(row.verdict.replaced for row in rows), sum(row.seconds for row in rows)
    lines += [
        "",
        f"transformers {transformers.__version__}, {len(rows)} model types: {counts}; {replaced} attention modules "
        f"replaced, {seconds:.0f} s.",
    ]
    return "\n".join(lines)


def _name(row: Row) -> str:
    n, m = row.verdict.replaced, row.verdict.attentions
    return row.model_type if row.verdict.kind != EQUAL or n == m else f"{row.model_type} ({n} of {m})"


def _text(result: Verdict) -> str:
    if result.kind != EQUAL:
        return f"{result.kind}: {result.detail}"
    kept = "; ".join(sorted({*result.skipped.values()}))
    parts = [result.kind if not kept else f"{result.kind} but for {kept}", result.detail]
    return ", ".join(part for part in parts if part)
