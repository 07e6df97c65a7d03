"""Text without a download: docstrings and source of the Python standard library of the running interpreter."""

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from longvq_layers.tasks.standard_library import bucket, library_files, top_level

_CHARACTERS_PER_TOKEN = 4.8  # more than docstrings have, so that a long enough document fills its tokens
_DOCUMENTS_PER_MODULE = 3


def documents(calibration: int, held_out: int, max_tokens: int = 512) -> tuple[list[str], list[str]]:
    """Calibration and held-out documents: docstrings of one module each, run together until they fill ``max_tokens``.

    No top-level module or package serves both lists, and no docstring occurs twice, so nothing that the codebooks were
    fitted to is measured. The choice depends on nothing but the interpreter's library.

    Raises:
        ValueError: the library has too few docstrings (some embedded interpreters carry none).
    """
    wanted = {"calibration": calibration, "held out": held_out}
    found: dict[str, list[str]] = {"calibration": [], "held out": []}
    seen: set[str] = set()
    for path, name in library_files():
        split = "calibration" if bucket(top_level(name), 4) == 0 else "held out"
        if len(found[split]) < wanted[split]:
            texts = _module_documents(path, int(max_tokens * _CHARACTERS_PER_TOKEN), seen)
            found[split] += texts[: min(_DOCUMENTS_PER_MODULE, wanted[split] - len(found[split]))]
        elif all(len(found[key]) == wanted[key] for key in wanted):
            break
    for key, texts in found.items():
        if len(texts) < wanted[key]:
            raise ValueError(
                f"documents: the standard library in {sysconfig.get_paths()['stdlib']} gives {len(texts)} {key} "
                f"documents, expected {wanted[key]}"
            )
    return found["calibration"], found["held out"]


def source_bytes(train: int, held_out: int) -> tuple[bytes, bytes]:
    """At most ``train`` and ``held_out`` bytes of source; no top-level module or package serves both."""
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    missing = {True: held_out, False: train}
    for path, name in library_files():
        is_held_out = bucket(top_level(name), 8) == 0
        if missing[is_held_out] > 0:
            text = path.read_bytes()
            if is_held_out:
                text = text[:4096]  # a piece of many files says more than all of one
            parts[is_held_out].append(text[: missing[is_held_out]])
            missing[is_held_out] -= len(text)
        elif max(missing.values()) <= 0:
            break
    return b"".join(parts[False]), b"".join(parts[True])


def _module_documents(path: Path, characters: int, seen: set[str]) -> list[str]:
    texts, current = [], ""
    for docstring in _docstrings(path):
        if docstring in seen or len(docstring) < 40:
            continue
        seen.add(docstring)
        current = f"{current}\n\n{docstring}" if current else docstring
        if len(current) >= characters:
            texts.append(current[:characters])
            current = ""
    if len(current) >= characters // 2:  # attention has little to do in short documents
        texts.append(current)
    return texts


def _docstrings(path: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # deliberately broken samples
            return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring
