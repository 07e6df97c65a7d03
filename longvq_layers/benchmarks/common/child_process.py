"""A module of this package run in a process of its own, with arguments and result as JSON.

The parent calls `in_child_process(module, arguments)`; the module ends in

    if __name__ == "__main__":
        answer(function)
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_PACKAGE_PARENT = str(Path(__file__).resolve().parents[3])


def environment(**more: str) -> dict[str, str]:
    """The variables of this process and `more`, with this package on the path."""
    path = os.pathsep.join(filter(None, [_PACKAGE_PARENT, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **more}


def in_child_process(module: str, arguments: Sequence[object], **variables: str) -> Any:
    """The result of `python -m MODULE ARGUMENTS`: the last line that it prints.

    Args:
        module: its dotted name.
        arguments: of the function that the module passes to `answer`; JSON.
        variables: of the environment, besides those of this process.

    Raises:
        RuntimeError: the process failed.
    """
    child = subprocess.run(
        [sys.executable, "-m", module, json.dumps(arguments)],
        env=environment(**variables),
        capture_output=True,
        text=True,
    )
    if child.returncode != 0:
        raise RuntimeError(f"the process that measures memory failed:\n{child.stderr[-2000:]}")
    return json.loads(child.stdout.splitlines()[-1])


def answer(function: Callable[..., object]) -> None:
    """In the child: call `function` with the arguments of the parent and print the result."""
    print(json.dumps(function(*json.loads(sys.argv[1]))))
