"""`python -m longvq_layers.info`: what this installation can do. Paste the output into bug reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterable

import torch

import longvq_layers
from longvq_layers import _extension
from longvq_layers.ops import _dispatch


def report() -> str:
    """The whole text that `python -m longvq_layers.info` prints."""
    sections = [
        ("Versions", _versions()),
        ("Native library", _native_library()),
        ("Built with", _built_with()),
        ("This machine", _machine()),
    ]
    parts = [f"{title}\n" + "\n".join(f"  {name:<24} {value}" for name, value in rows) for title, rows in sections]
    return "\n\n".join([*parts, _operators()])


def _versions() -> Iterable[tuple[str, str]]:
    yield "longvq_layers", f"{longvq_layers.__version__} ({os.path.dirname(longvq_layers.__file__)})"
    yield "python", platform.python_version()
    yield "torch", torch.__version__
    try:
        yield "transformers", importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        yield "transformers", "not installed"


def _native_library() -> Iterable[tuple[str, str]]:
    yield "loaded", "yes" if _extension.is_loaded() else f"no, {_extension.load_error()}"
    if _extension.is_loaded():
        yield "file", str(_extension.LIBRARY)
        yield "instruction set", _extension.cpu_capability() or "unknown"
    unproven = ', for backend="native" only: no GPU has tested them' if "cuda" in _dispatch.UNPROVEN else ""
    yield "CUDA kernels", f"loaded{unproven}" if _extension.cuda_is_loaded() else f"no, {_extension.cuda_load_error()}"
    yield _extension.CPU_CAPABILITY, os.environ.get(_extension.CPU_CAPABILITY) or "not set"
    yield _extension.DISABLE, os.environ.get(_extension.DISABLE) or "not set"
    yield _extension.ANOTHER_LIBRARY, os.environ.get(_extension.ANOTHER_LIBRARY) or "not set"


def _built_with() -> Iterable[tuple[str, str]]:
    if _extension.IS_ANOTHER_LIBRARY:
        yield "note", f"this describes the package's own library, not that of {_extension.ANOTHER_LIBRARY}"
    for name, value in _extension.build_info().items():
        if isinstance(value, dict):
            for key, entry in value.items():
                if entry is not None:
                    yield f"{name}.{key}", " ".join(entry) or "none" if isinstance(entry, list) else str(entry)
        elif isinstance(value, list):
            yield name, ", ".join(map(str, value)) or "none"
        elif value is not None:
            yield name, str(value)


def _machine() -> Iterable[tuple[str, str]]:
    yield "platform", platform.platform()
    yield "torch threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    yield "torch instruction set", torch.backends.cpu.get_cpu_capability()
    if torch.cuda.is_available():
        yield "CUDA", ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    else:
        yield "CUDA", "not available" if torch.version.cuda else "not available, torch was built without it"


def _operators() -> str:
    """A line per operator, device and dtype; each reason is listed once, below the table."""
    rows = _dispatch.availability()
    backends = list(rows[0][3]) if rows else []
    reasons: dict[str, int] = {}

    def cell(reason: str | None) -> str:
        return "yes" if reason is None else f"no ({reasons.setdefault(reason, len(reasons) + 1)})"

    lines = [f"  {'operator':<14} {'device':<7} {'dtype':<9} " + " ".join(f"{name:<10}" for name in backends)]
    for op, device, dtype, available in rows:
        cells = " ".join(f"{cell(available[name]):<10}" for name in backends)
        lines.append(f"  {op:<14} {device:<7} {dtype:<9} {cells}".rstrip())
    lines += [f"  ({number}) {reason}" for reason, number in reasons.items()]
    return "\n".join(["Operators and their backends", *lines])


if __name__ == "__main__":
    print(report())
