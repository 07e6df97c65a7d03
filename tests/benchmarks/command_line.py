"""The parsed options of a benchmark."""

import argparse
from pathlib import Path


def parsed(module, out: Path, *words: str) -> argparse.Namespace:
    """The options of a benchmark's module that writes to `out` and uses one thread."""
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args([*words, "--threads", "1", "--out", str(out)])
