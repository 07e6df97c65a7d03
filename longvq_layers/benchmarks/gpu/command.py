"""Everything a GPU can say in one run: build, check and time the CUDA kernels, and write one table.

    python -m longvq_layers.benchmarks gpu --out DIR

Needs torch with CUDA; with the sources and nvcc beside it the kernels are built first, otherwise those of the package
are taken. No network, no other package; with pytest and hypothesis the tests of the kernels run on the GPU as well, and
with compute-sanitizer its memcheck and racecheck. Parts that fail are reported, and the others go on.
"""

import argparse
import contextlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from longvq_layers import _extension
from longvq_layers.benchmarks import gpu_checks, gpu_times

_ROOT = Path(__file__).resolve().parents[2]
_TIMEOUT = 150  # seconds of a process that checks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("gpu_benchmark"), metavar="DIR", help="default %(default)s/")
    parser.add_argument("--budget", type=float, default=420.0, metavar="S", help="seconds in all, default %(default)s")
    parser.add_argument("--checks-only", action="store_true", help="no build, no times: what the sanitizers look at")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs; figures mean nothing")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # "cpu": the machinery, for its own tests


def run(args: argparse.Namespace) -> None:
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no GPU that this torch can use")
    report = Report(args.out, args.budget)
    if args.checks_only:
        report.part("checks", lambda: [gpu_checks.run(args.device, count=12)])
        report.finish()
        return
    report.part("machine", lambda: [_machine(args.device)])
    report.part("build", lambda: [_build() if args.device == "cuda" else "not built: a run on the CPU"])
    report.part(
        "checks against the PyTorch backend in float64",
        lambda: [gpu_checks.run(args.device, count=4 if args.quick else 60)],
    )
    report.part("layers against the CPU in float64", lambda: [gpu_checks.layers(args.device)])
    for title, times in gpu_times.PARTS.items():
        report.part(title, lambda times=times: times(args.device, args.quick))
    if args.device == "cuda":
        report.part("tests", lambda: [_tests()])
        for tool in ("memcheck", "racecheck"):
            report.part(f"compute-sanitizer {tool}", lambda tool=tool: [_sanitize(tool, args.out)])
    report.finish()


class Report:
    """Lines that are on disk as soon as they are there."""

    def __init__(self, folder: Path, budget: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.budget, self.start, self.failed = folder / "gpu.md", budget, time.monotonic(), []
        self.path.write_text("")

    def add(self, text: str) -> None:
        print(text, flush=True)
        with self.path.open("a") as file:
            file.write(text + "\n")

    def part(self, title: str, lines: Callable[[], Iterable[str]]) -> None:
        """A section, left out if time is up; an error in it is written down and the run goes on."""
        self.add(f"\n## {title}\n")
        started = time.monotonic()
        try:
            if started - self.start > self.budget:
                raise TimeoutError(f"left out: {started - self.start:.0f} s of {self.budget:.0f} are over")
            for line in lines():
                self.add(line)
        except Exception as error:
            self.failed.append(title)
            self.add(f"FAILED: {type(error).__name__}: {error}\n\n```\n{traceback.format_exc()[-1500:]}```")
        self.add(f"\n({time.monotonic() - started:.1f} s)")

    def finish(self) -> None:
        self.add(f"\nWritten: {self.path}")
        if self.failed:
            sys.exit(f"failed: {', '.join(self.failed)}")


def _machine(device: str) -> str:
    if device == "cpu":
        return f"torch {torch.__version__}, on the CPU"
    properties = torch.cuda.get_device_properties(0)
    return (
        f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.multi_processor_count} "
        f"multiprocessors, {properties.total_memory / 2**30:.0f} GiB; torch {torch.__version__}, CUDA "
        f"{torch.version.cuda}"
    )


def _build() -> str:
    """Build what isn't loaded yet where the sources are, load it, and say what it was built with."""
    lines = []
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", _architecture())
    support = _ROOT / "csrc" / "build_support"
    if support.exists():
        sys.path.insert(0, str(support))
        import cuda_library
        import native_library

        builds = {
            _extension.LIBRARY: (_extension.is_loaded, native_library.build),
            _extension.CUDA_LIBRARY: (_extension.cuda_is_loaded, cuda_library.build),
        }
        for target, (is_loaded, build) in builds.items():
            if is_loaded():
                lines.append(f"{target.name}: loaded already, as it was installed")
                continue
            with contextlib.redirect_stdout(io.StringIO()):
                library, info, *_ = build()
            target.parent.mkdir(parents=True, exist_ok=True)
            unfinished = target.with_suffix(".tmp")
            shutil.copy(library, unfinished)
            os.replace(unfinished, target)
            lines.append(f"{target.name}: built, {info}")
    _extension.load()
    if not _extension.load_cuda():
        raise RuntimeError(f"the CUDA kernels don't load: {_extension.cuda_load_error()}")
    return "\n".join([*lines, "loaded"])


def _architecture() -> str:
    """Of this GPU alone, which is faster to build for; of Hopper with what only Hopper has."""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}{'a' if major == 9 else ''}"


def _tests() -> str:
    if not (_ROOT / "tests" / "cuda").exists():
        return "left out: no tests beside the package"
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing:
        return f"left out: no {' and '.join(missing)} here"
    return _process([sys.executable, "-m", "pytest", "-q", "-k", "on_gpu", str(_ROOT / "tests" / "cuda")])


def _sanitize(tool: str, out: Path) -> str:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        return "left out: no compute-sanitizer on PATH"
    check = ["-m", "longvq_layers.benchmarks", "gpu", "--checks-only", "--out", str(out / tool)]
    return _process([sanitizer, "--tool", tool, "--error-exitcode", "3", sys.executable, *check])


def _process(command: list[str]) -> str:
    try:
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=_TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"not finished after {_TIMEOUT} s: {(error.stdout or b'')[-500:]!r}") from error
    tail = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
    if done.returncode != 0:
        raise RuntimeError(f"exit status {done.returncode}:\n{tail}")
    return tail
