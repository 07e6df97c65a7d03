"""Build commands that compile the native libraries into the package; everything else is in pyproject.toml.

LONGVQ_BUILD=0  install as pure Python
LONGVQ_BUILD=1  compile; a failure is an error
unset           compile if possible, otherwise print the reason and install as pure Python

The CUDA kernels are also compiled if torch has CUDA and nvcc is found (CUDA_HOME, CUDACXX or PATH).
FORCE_CUDA=1           compile them for a torch without CUDA too; a failure is an error
TORCH_CUDA_ARCH_LIST   the GPUs to compile for; default "8.0+PTX;9.0a"
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from setuptools import Command, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
PACKAGE = "longvq_layers"
# What the sdist contains beside the package, README.md, LICENSE, setup.py and pyproject.toml.
SHIPPED_FOLDERS = ("csrc", "docs", "tests", ".ci")
SHIPPED_FILES = (
    ".clang-format",
    ".editorconfig",
    ".pre-commit-config.yaml",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "Makefile",
    "SECURITY.md",
)
sys.path.insert(0, str(ROOT / "csrc" / "build_support"))

import cuda_library  # noqa: E402
import native_library  # noqa: E402
from find_torch import find_torch  # noqa: E402


class build_native(Command):
    """Compile csrc/ unless LONGVQ_BUILD=0, then put the libraries and their metadata in place."""

    description = "compile the native kernels"
    user_options = []  # noqa: RUF012  distutils reads this name

    def initialize_options(self) -> None:
        self.editable_mode = False  # set by setuptools for `pip install -e`
        self.build_lib = None
        self.built = False
        self.libraries: list[tuple[str, Path | None]] = []

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        library, info = self._build()
        cuda, info["cuda"] = self._build_cuda() if library else (None, {"built": False, "reason": info["reason"]})
        self.built = library is not None
        self.libraries = [(native_library.LIBRARY, library), (cuda_library.LIBRARY, cuda)]
        package = ROOT / PACKAGE if self.editable_mode else Path(self.build_lib, PACKAGE)
        for name, built in self.libraries:
            if built is None:
                (package / name).unlink(missing_ok=True)  # from an earlier build
            else:
                self._place(package / name, built.read_bytes())
        self._place(package / native_library.BUILD_INFO, (json.dumps(info, indent=2) + "\n").encode())

    def _build(self) -> tuple[Path | None, dict[str, object]]:
        mode = native_library.build_mode()
        if mode == "0":
            return None, {"built": False, "reason": "LONGVQ_BUILD=0 when it was installed"}
        try:
            return native_library.build()
        except native_library.BuildError as error:
            print(error.log, file=sys.stderr)
            if mode == "1":
                raise SystemExit(f"LONGVQ_BUILD=1, but the native kernels can't be built: {error}") from error
            line = "*" * 78
            print(
                f"{line}\nlongvq-layers is being installed WITHOUT its native kernels: {error}\n"
                f"Everything works, on PyTorch alone. Set LONGVQ_BUILD=1 to make this an error.\n{line}",
                file=sys.stderr,
            )
            return None, {"built": False, "reason": str(error)}

    def _build_cuda(self) -> tuple[Path | None, dict[str, object]]:
        torch = find_torch()  # never None here: the CPU library was built with it
        reason = cuda_library.why_not(torch)
        try:
            if reason is None:
                library, info, _ = cuda_library.build()
                return library, {"built": True, "reason": None, **info}
            if os.environ.get("FORCE_CUDA", "0") not in ("", "0"):
                raise native_library.BuildError(reason)
        except native_library.BuildError as error:
            print(error.log, file=sys.stderr)
            if os.environ.get("FORCE_CUDA", "0") not in ("", "0"):
                raise SystemExit(f"FORCE_CUDA=1, but the CUDA kernels can't be built: {error}") from error
            print(f"longvq-layers is being installed without its CUDA kernels: {error}", file=sys.stderr)
            reason = str(error)
        return None, {"built": False, "reason": reason}

    @staticmethod
    def _place(target: Path, content: bytes) -> None:
        """Replace the file, never overwrite it: another process may have mapped the old library into memory."""
        if target.exists() and target.read_bytes() == content:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        unfinished.write_bytes(content)
        os.replace(unfinished, target)

    def get_outputs(self) -> list[str]:
        names = [native_library.BUILD_INFO] + [name for name, library in self.libraries if library is not None]
        return [] if self.editable_mode else [str(Path(self.build_lib, PACKAGE, name)) for name in names]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        """The files that the sdist ships beside the Python package: those that build, test and document it."""
        files = [ROOT / name for name in SHIPPED_FILES]
        for folder in SHIPPED_FOLDERS:
            files += [p for p in (ROOT / folder).rglob("*") if "__pycache__" not in p.parts]
        return sorted(str(p.relative_to(ROOT)) for p in files if p.is_file())


class build_with_native(build):
    sub_commands = [*build.sub_commands, ("build_native", None)]  # noqa: RUF012


class bdist_wheel_with_native(bdist_wheel):
    """Tag the wheel py3-none-<platform> with the library, which uses no Python API, and py3-none-any without it."""

    def run(self) -> None:
        shutil.rmtree(
            self.get_finalized_command("build_py").build_lib, ignore_errors=True
        )  # may hold files that the sources no longer have
        self.run_command("build_native")
        if self.get_finalized_command("build_native").built:
            self.distribution.has_ext_modules = lambda: True
            self.root_is_pure = False
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        if self.root_is_pure:
            return ("py3", "none", "any")
        return ("py3", "none", super().get_tag()[2])


setup(
    cmdclass={
        "build": build_with_native,
        "build_native": build_native,
        "bdist_wheel": bdist_wheel_with_native,
    }
)
