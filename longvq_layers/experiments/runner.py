"""Runs of a suite, several at a time; finished runs are not repeated."""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from longvq_layers.benchmarks.common import child_process
from longvq_layers.experiments.suites import Suite


def folder_of(out: Path, label: str, seed: int) -> Path:
    """The folder of the run of a variant and seed."""
    words = "".join(letter if letter.isalnum() else " " for letter in label).split()
    return out / f"{'-'.join(words)}-{seed}"


def run_all(suite: Suite, out: Path, seeds: Sequence[int], jobs: int, say: Callable[[str], None]) -> None:
    """Train every variant with every seed, `jobs` processes at a time with one thread each.

    Args:
        suite: with the variants.
        out: folder of the runs.
        seeds: of each variant.
        jobs: processes at a time.
        say: gets a line for every run that ends.

    Raises:
        RuntimeError: a run failed; raised when the other runs are finished.
    """
    waiting = [(label, seed) for seed in seeds for label in suite.variants]
    running: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
    failed = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                label, seed = waiting.pop(0)
                folder = folder_of(out, label, seed)
                if not (folder / "result.json").exists():
                    running[label, seed] = _start(suite, label, seed, folder)
            for key, process in list(running.items()):
                if process.poll() is not None:
                    del running[key]
                    say(f"{key[0]}, seed {key[1]}: {'done' if process.returncode == 0 else 'FAILED'}")
                    failed += [key] * (process.returncode != 0)
            time.sleep(0.2)
    finally:
        for process in running.values():
            process.kill()
    if failed:
        label, seed = failed[0]
        log = folder_of(out, label, seed) / "output.txt"
        raise RuntimeError(f"{len(failed)} runs failed; the first, {label}, seed {seed}:\n{log.read_text()[-2000:]}")


def _start(suite: Suite, label: str, seed: int, folder: Path) -> subprocess.Popen[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    replace(suite.settings(label, seed), threads=1).save(folder / "settings.json")
    with (folder / "output.txt").open("w") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "longvq_layers.experiments.one", str(folder)],
            env=child_process.environment(OMP_NUM_THREADS="1"),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
