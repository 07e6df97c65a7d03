"""`make sanitize`: the kernel tests on a library built with AddressSanitizer and UndefinedBehaviorSanitizer. GCC only.

The library is built in build/sanitize and loaded through `LONGVQ_LIBRARY`; the installed library does not change. The
tests run once per instruction set of this machine. Arguments replace the arguments of pytest.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import native_library
from native_library import ROOT

FLAGS = [
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
    "-g",
    "-O1",  # -O3 would remove some wrong accesses, and most line numbers from the reports
]

# Checks, in the environment of the tests, that the library is loaded and has the checks of the sanitizers.
_CHECK = """
import sys
from pathlib import Path
from longvq_layers import _extension
assert _extension.is_loaded(), _extension.load_error()
assert _extension.LIBRARY.samefile(sys.argv[1])
content = _extension.LIBRARY.read_bytes()
assert b"__asan_report_" in content and b"__ubsan_handle_" in content, "the library is not instrumented"
print(_extension.cpu_capability())
"""


def main() -> None:
    compiler = native_library.Compiler(native_library.find_compiler() or ["g++"])
    if "clang" in compiler.version:
        raise SystemExit(f"make sanitize: the compiler must be GCC, got {compiler.version}")
    try:
        library, info = native_library.build(Path("build", "sanitize"), FLAGS)
    except native_library.BuildError as error:
        print(error.log, file=sys.stderr)
        raise SystemExit(f"the sanitized kernels can't be built: {error}") from error
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("LONGVQ_")},
        "LONGVQ_LIBRARY": str(library),
        # Python is not instrumented, so the runtime must be preloaded. At its start, the runtime looks up the function
        # that throws C++ exceptions, which Python does not have; hence libstdc++.
        "LD_PRELOAD": f"{_runtime(compiler, 'libasan.so')} {_runtime(compiler, 'libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and PyTorch do not free everything at exit
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }
    check = [sys.executable, "-c", _CHECK, str(library)]
    best = subprocess.run(check, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()

    tests = sys.argv[1:] or ["-q", "-m", "not slow", *sorted(map(str, ROOT.glob("tests/ops/**/test_*_native.py")))]
    pytest = [sys.executable, "-m", "pytest", "--capture=sys", *tests]  # the default would hide the reports
    instruction_sets, failed = info["instruction_sets"], []
    for capability in instruction_sets[: instruction_sets.index(best) + 1]:
        print(f"==== sanitized kernels on {capability}", flush=True)
        if subprocess.run(pytest, env={**environment, "LONGVQ_CPU_CAPABILITY": capability}, cwd=ROOT).returncode != 0:
            failed.append(capability)
    if failed:
        raise SystemExit(f"the sanitized kernels failed on {', '.join(failed)}: see the reports above")


def _runtime(compiler: native_library.Compiler, name: str) -> str:
    """The path of a library that comes with the compiler."""
    command = [*compiler.command, f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(path).is_absolute():  # GCC prints only the name of a file that it does not have
        raise SystemExit(f"make sanitize needs {name}, which does not come with this {compiler.version}")
    return path


if __name__ == "__main__":
    main()
