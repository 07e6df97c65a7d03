"""Documents without a download: docstrings of the standard library of the running interpreter."""

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from longvq_layers.tasks.standard_library import bucket, library_files, top_level

_CHARACTERS_PER_TOKEN = 4.8  # more than docstrings have, so that a document of that size fills its tokens
_DOCUMENTS_PER_MODULE = 3


def documents(calibration: int, held_out: int, max_tokens: int = 512) -> tuple[list[str], list[str]]:
    """Calibration and held-out documents: docstrings of one module, joined until they fill ``max_tokens``.

    No top-level module or package serves both lists, and no docstring occurs twice: codebooks are not measured on what
    they were fitted to. The choice depends only on the interpreter's library.

    Args:
        calibration: number of documents to calibrate on.
        held_out: number of documents to measure on.
        max_tokens: about the length of a document.

    Raises:
        ValueError: the library has too few docstrings (some embedded interpreters have none).
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
                f"documents: the standard library in {sysconfig.get_paths()['stdlib']} must give {wanted[key]} {key} "
                f"documents, got {len(texts)}"
            )
    return found["calibration"], found["held out"]


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
