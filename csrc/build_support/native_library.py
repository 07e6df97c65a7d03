"""Compile csrc/ into one shared library. It does not use the Python C API; `torch.ops.load_library` loads it.

Files named `csrc/**/*_kernel.cpp` are compiled once per instruction set, with `LONGVQ_ISA` set to its name, other
`.cpp` files once. Objects are cached in `build/native` by a digest of everything that they depend on, so only changed
files are compiled again.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from find_torch import MINIMUM, Torch, find_torch

ROOT = Path(__file__).resolve().parents[2]
CUDA = "cuda"  # this folder of csrc/ is a library of its own, see cuda_library.py
CACHE = Path("build", "native")  # relative to ROOT, where the compiler runs, so that the library has no absolute paths

LIBRARY = "lib/liblongvq.so"  # inside the package
BUILD_INFO = "_build_info.json"

STABLE_ABI_TARGET = ".".join(map(str, MINIMUM))
COMMON_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-ffp-contract=fast",  # use fused multiply-add where the instruction set has it
    "-Wall",
    "-Wextra",
    f"-DTORCH_TARGET_VERSION=0x{MINIMUM[0]:02x}{MINIMUM[1]:02x}000000000000",
]
X86_FLAGS = {
    "default": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx2", "-mfma", "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"],
}
LINK_FLAGS = ["-shared", "-Wl,--no-undefined", "-Wl,--no-as-needed", "-ltorch_cpu", "-Wl,--as-needed"]


class BuildError(Exception):
    """The library can't be built. The message is one line for the user; `log` is the output of the compiler."""

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log


@dataclass
class Compiler:
    """A C++ compiler, with the first line of its `--version` and its `-dumpmachine`."""

    command: list[str]
    version: str = field(init=False)
    machine: str = field(init=False)

    def __post_init__(self) -> None:
        self.version = self._ask("--version").splitlines()[0]
        self.machine = self._ask("-dumpmachine").strip()

    def _ask(self, option: str) -> str:
        try:
            answer = subprocess.run([*self.command, option], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise BuildError(f"the C++ compiler {shlex.join(self.command)!r} does not run: {error}") from error
        if not answer.stdout.strip():
            raise BuildError(f"the C++ compiler {shlex.join(self.command)!r} prints nothing for {option}")
        return answer.stdout


def find_compiler() -> list[str] | None:
    """The command of a C++ compiler: `CXX` if set, otherwise the first of c++, g++, clang++ on PATH."""
    if asked := shlex.split(os.environ.get("CXX", "")):
        return asked if shutil.which(asked[0]) else None
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    return None


def build_mode() -> str:
    """The value of `LONGVQ_BUILD`: "0" never compile, "1" a failure is an error, "" (unset) compile if possible."""
    mode = os.environ.get("LONGVQ_BUILD", "")
    if mode not in ("", "0", "1"):
        raise SystemExit(f"LONGVQ_BUILD must be 0, 1 or unset, got {mode!r}")
    return mode


def build(cache: Path = CACHE, more_flags: Sequence[str] = ()) -> tuple[Path, dict[str, Any]]:
    """Compile all files that are not in the cache. Returns the library and the information to record about it.

    `more_flags` are passed to the compiler and the linker, after the flags of this module. Raises `BuildError`.
    """
    command = find_compiler()
    if command is None:
        asked = os.environ.get("CXX")
        raise BuildError(f"CXX={asked} is not on PATH" if asked else "no C++ compiler (c++, g++ or clang++) on PATH")
    torch = find_torch()
    if torch is None:
        raise BuildError(f"no torch >= {STABLE_ABI_TARGET} to compile against")
    compiler = Compiler(command)
    if "mingw" in compiler.machine or "windows" in compiler.machine or "apple" in compiler.machine:
        raise BuildError(f"no native kernels for {compiler.machine} yet")

    # For other processors there is one portable variant: every *_kernel.cpp is plain C++ with GCC/Clang vector types.
    isa_flags = X86_FLAGS if compiler.machine.startswith("x86_64") else {"default": []}
    have = [f"-DLONGVQ_HAVE_{isa.upper()}" for isa in isa_flags if isa != "default"]
    flags = [*COMMON_FLAGS, *have, *more_flags]
    jobs: list[tuple[Path, list[str]]] = []
    for source in sources("*.cpp", but=CUDA):
        if source.stem.endswith("_kernel"):
            jobs += [(source, [*isa, f"-DLONGVQ_ISA={name}"]) for name, isa in isa_flags.items()]
        else:
            jobs.append((source, []))

    setting = setting_of(compiler, torch, flags, sources("*.h", but=CUDA))
    (ROOT / cache).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda job: compile_cpp(compiler, torch, flags, cache, setting, *job), jobs))
    library = link(command, torch, [*LINK_FLAGS, *more_flags], cache, objects)
    info: dict[str, Any] = {
        "built": True,
        "reason": None,
        "torch": torch.version,
        "stable_abi_target": STABLE_ABI_TARGET,
        "compiler": compiler.version,
        "machine": compiler.machine,
        "flags": {"common": flags, **isa_flags},
        "instruction_sets": list(isa_flags),
    }
    return library, info


def sources(pattern: str, but: str | None = None) -> list[Path]:
    """The files of csrc/ that match, relative to ROOT, without those of the folder `but` of csrc/."""
    found = (p.relative_to(ROOT) for p in (ROOT / "csrc").rglob(pattern))
    return sorted(p for p in found if but is None or p.parts[1] != but)


def setting_of(compiler: Compiler, torch: Torch, flags: Sequence[str], headers: Sequence[Path]) -> str:
    """A digest of everything that every object depends on."""
    texts = [f"{p}\n{(ROOT / p).read_text()}" for p in headers]
    return digest(compiler.version, compiler.machine, torch.version, str(torch.root), *flags, *texts)


def compile_cpp(
    compiler: Compiler,
    torch: Torch,
    flags: Sequence[str],
    cache: Path,
    setting: str,
    source: Path,
    extra: Sequence[str] = (),
) -> Path:
    """Compile one file unless its object is cached. Returns the object, relative to ROOT."""
    target = cache / f"{source.stem}-{digest(setting, str(source), (ROOT / source).read_text(), *extra)}.o"
    if not (ROOT / target).exists():
        # The prefix map removes the path of torch from error messages in the library.
        include = [f"-ffile-prefix-map={torch.include}=torch", "-isystem", str(torch.include)]
        run([*compiler.command, *flags, *extra, *include, "-c", str(source)], target)
    return target


def link(
    command: Sequence[str],
    torch: Torch,
    flags: Sequence[str],
    cache: Path,
    objects: Sequence[Path],
    name: str = "longvq",
) -> Path:
    """Link the objects unless the library is cached. Returns the library."""
    target = cache / f"lib{name}-{digest(*map(str, objects), *flags)}.so"
    if not (ROOT / target).exists():
        run([*command, *map(str, objects), f"-L{torch.lib}", *flags], target)
    return ROOT / target


def run(command: Sequence[str], target: Path) -> str:
    """Run a command that writes `target`. The file appears only when it is complete, so builds can run concurrently.

    Prints the output of the command and returns it.
    """
    print(shlex.join([*command, "-o", str(target)]), flush=True)
    unfinished = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        done = subprocess.run([*command, "-o", str(unfinished)], cwd=ROOT, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"{command[0]} does not run: {error}") from error
    log = done.stdout + done.stderr
    if done.returncode != 0:
        errors = [line for line in log.splitlines() if "error" in line.lower()] or log.splitlines() or ["no output"]
        raise BuildError(f"{command[0]} failed: {errors[0]}", log)
    if log:
        print(log, flush=True)
    os.replace(ROOT / unfinished, ROOT / target)
    return log


def digest(*parts: str) -> str:
    """A short hash of the parts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
