"""Compile csrc/cuda with nvcc into a library of its own. Python loads it beside the CPU library if torch has CUDA.

    python csrc/build_support/cuda_library.py [--out FILE]

compiles every kernel for every architecture and prints a table of their registers, stack, spills and largest shared
memory (of the scan: with 32 modes). A warning is an error, and so is a kernel that spills or uses local memory. This
needs neither a GPU nor a torch with CUDA.

`on_host()` compiles the same sources with the C++ compiler alone, for tests that run the kernels on the CPU.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path

import native_library
import shared_memory
from find_torch import Torch, find_torch
from native_library import CACHE, CUDA, ROOT, BuildError, Compiler

ON_HOST = Path("csrc", CUDA, "on_host")
LIBRARY = "lib/liblongvq_cuda.so"  # inside the package
ARCHITECTURES = "8.0+PTX;9.0a"  # the default of TORCH_CUDA_ARCH_LIST: Ampere, Hopper, and newer GPUs by PTX
NVCC_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden"]
LINK_FLAGS = ["-shared", "-cudart=static", "-Xlinker=--no-undefined", "-ltorch_cpu"]
CHECKS = ["-Werror=all-warnings", "-Xptxas=-v"]


@dataclass(frozen=True)
class Kernel:
    """The resources of one kernel on one architecture, as ptxas reports them."""

    name: str
    architecture: str
    registers: int
    stack: int  # bytes for each thread
    spills: int  # bytes stored by each thread


def why_not(torch: Torch) -> str | None:
    """Why the CUDA kernels are not built here; None if they are. `FORCE_CUDA=1` builds them for any torch."""
    if os.environ.get("FORCE_CUDA", "0") not in ("", "0"):
        return None if find_nvcc() else "FORCE_CUDA=1, but there is no nvcc: set CUDA_HOME or CUDACXX"
    cuda = re.search(r"^cuda\b[^=]*=\s*'(\d+)", (torch.root / "version.py").read_text(), re.MULTILINE)
    if cuda is None:
        return "this torch was built without CUDA (FORCE_CUDA=1 builds them anyway)"
    nvcc = find_nvcc()
    if nvcc is None:
        return "no nvcc: set CUDA_HOME or CUDACXX, or put it on PATH"
    version = _nvcc_version(nvcc)
    if version.split(".")[0] != cuda[1]:
        return f"nvcc is of CUDA {version}, this torch of CUDA {cuda[1]} (FORCE_CUDA=1 builds them anyway)"
    return None


def find_nvcc() -> str | None:
    """`CUDACXX`, or nvcc in `CUDA_HOME`, or nvcc on PATH."""
    if named := os.environ.get("CUDACXX"):
        return shutil.which(named)
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which(str(Path(home, "bin", "nvcc")) if home else "nvcc")


def architectures() -> list[str]:
    """nvcc's options for `TORCH_CUDA_ARCH_LIST`, which has entries like "8.0", "9.0a" and "9.0+PTX"."""
    options = []
    for entry in re.split(r"[;\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if not match:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST must be numbers like 8.0, 9.0a or 9.0+PTX, got {entry!r}")
        number = "".join(match.group(1, 2, 3))
        options.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[4]:  # PTX, which the driver compiles for newer GPUs
            options.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return options


def build(more_flags: Sequence[str] = ()) -> tuple[Path, dict[str, str | list[str]], list[Kernel]]:
    """The library, the information to record about it, and, with CHECKS among the flags, its kernels."""
    command, torch, nvcc = native_library.find_compiler(), find_torch(), find_nvcc()
    if command is None or torch is None or nvcc is None:
        missing = "C++ compiler" if command is None else "torch" if torch is None else "nvcc"
        raise BuildError(f"no {missing} to build the CUDA kernels with")
    compiler = Compiler(command)
    version = _nvcc_version(nvcc)
    options = architectures()
    flags = native_library.COMMON_FLAGS
    headers = native_library.sources("*.h")
    setting = native_library.setting_of(compiler, torch, [*flags, version], headers)
    (ROOT / CACHE).mkdir(parents=True, exist_ok=True)

    def compile_source(source: Path) -> tuple[Path, str]:
        if source.suffix == ".cpp":
            return native_library.compile_cpp(compiler, torch, flags, CACHE, setting, source), ""
        arguments = [nvcc, "-ccbin", command[0], *NVCC_FLAGS, *options, *more_flags]
        text = (ROOT / source).read_text()
        target = CACHE / f"{source.stem}-cuda-{native_library.digest(setting, text, *arguments)}.o"
        log = (ROOT / target).with_suffix(".log")
        if not (ROOT / target).exists() or not log.exists():
            log.write_text(native_library.run([*arguments, "-c", str(source)], target))
        return target, log.read_text()

    inputs = [*native_library.sources("*.cu"), *_operator_sources()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects, logs = zip(*pool.map(compile_source, inputs), strict=True)
    library = native_library.link([nvcc, "-ccbin", command[0]], torch, LINK_FLAGS, CACHE, objects, "longvq_cuda")
    names = [option.rpartition("_")[2] for option in options]
    info: dict[str, str | list[str]] = {"nvcc": version, "architectures": names}
    return library, info, [kernel for log in logs for kernel in kernels_of(log)]


def on_host() -> Path:
    """A library of the same operators whose kernels are ordinary C++, run thread by thread (csrc/cuda/on_host)."""
    command, torch = native_library.find_compiler(), find_torch()
    if command is None or torch is None:
        raise BuildError(f"no {'C++ compiler' if command is None else 'torch'} to build the kernels with")
    compiler = Compiler(command)
    # Threads of a kernel change stacks by longjmp, which a fortified libc reports as an error.
    host_flags = ["-DLONGVQ_ON_HOST", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE", "-O2"]
    flags = [*native_library.COMMON_FLAGS, "-Werror", *host_flags]
    setting = native_library.setting_of(compiler, torch, flags, native_library.sources("*.h"))
    (ROOT / CACHE).mkdir(parents=True, exist_ok=True)
    jobs = [(source, ["-x", "c++"]) for source in native_library.sources("*.cu")]
    jobs += [(source, []) for source in _operator_sources() + native_library.sources(f"{CUDA}/on_host/*.cpp")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(
            pool.map(lambda job: native_library.compile_cpp(compiler, torch, flags, CACHE, setting, *job), jobs)
        )
    return native_library.link(command, torch, native_library.LINK_FLAGS, CACHE, objects, "longvq_cuda_on_host")


def kernels_of(log: str) -> list[Kernel]:
    """The kernels in the log of ptxas -v."""
    found = []
    pattern = (
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores"
        r".*?Used (\d+) registers"
    )
    for name, architecture, stack, spills, registers in re.findall(pattern, log, re.DOTALL):
        found.append(Kernel(name, architecture, int(registers), int(stack), int(spills)))
    return found


def _operator_sources() -> list[Path]:
    return [source for source in native_library.sources(f"{CUDA}/**/*.cpp") if ON_HOST not in source.parents]


def _nvcc_version(nvcc: str) -> str:
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"{nvcc} does not run: {error}") from error
    match = re.search(r"release \S+, V(\S+)", text)
    return match[1] if match else text.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile all CUDA kernels and print the resources of each.")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    try:
        library, info, kernels = build(CHECKS)
    except BuildError as error:
        print(error.log, file=sys.stderr)
        raise SystemExit(f"the CUDA kernels can't be built: {error}") from error
    names = dict(zip(kernels, shared_memory.readable([kernel.name for kernel in kernels]), strict=True))
    shared_bytes = shared_memory.largest_of_each_kernel(str(on_host()))
    lines = [
        f"nvcc {info['nvcc']}, architectures {', '.join(info['architectures'])}, {library.stat().st_size:,} bytes",
        "",
        "| kernel | architecture | registers | stack | spills | shared |",
        "|:---|:---|---:|---:|---:|---:|",
    ]
    for kernel in sorted(kernels, key=lambda kernel: (names[kernel], kernel.architecture)):
        cells = (names[kernel], *astuple(kernel)[1:], shared_bytes.get(names[kernel], "never launched"))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    table = "\n".join(lines)
    print(table)
    if args.out:
        args.out.write_text(table + "\n")
    wrong = [kernel for kernel in kernels if kernel.stack or kernel.spills]
    if wrong or not kernels:
        raise SystemExit(f"{len(wrong)} of {len(kernels)} kernels spill or use local memory")
    if idle := set(names.values()) - shared_bytes.keys():
        raise SystemExit(f"no call of csrc/build_support/shared_memory.py launches {', '.join(sorted(idle))}")


if __name__ == "__main__":
    main()
