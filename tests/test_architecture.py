"""The repository keeps its shape: imports go one way, folders and files stay small, public names are documented.

The tests read the source and import nothing of it. docs/architecture.md explains the layout, the tables here check it.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "longvq_layers"

# From the bottom to the top. A part imports only from lines above its own, and parts of one line not from each other.
# A name stands for a file or a folder with all that is in it; of two names that fit, the longer one counts.
LEVELS = (
    ("_checks", "_extension"),
    ("ops",),
    ("layers",),
    ("models", "replace"),
    ("health",),
    (PACKAGE,),  # __init__.py of the whole package
    ("info", "tasks"),
    ("train",),
    ("benchmarks",),
    ("demo", "experiments"),
)

# The same inside replace/.
LEVELS_OF_REPLACE = (
    ("model_inputs", "slot"),
    ("adapters.base",),
    ("adapters", "plan"),
    ("install", "rotary_policy"),
    ("options",),
    ("report", "select"),
    ("calibration", "distill", "load"),
    ("api",),
    ("replace",),  # __init__.py
)

PUBLIC = ("", "health", "layers", "models", "models.huggingface", "ops", "replace", "tasks", "train")

MOST_FILES = 12  # of one folder, __init__.py not counted
FULL_FOLDERS: dict[str, tuple[int, str]] = {}  # exceptions: folder: (files, why they stay together)
MOST_LINES = 400  # of one file
MOST_COLUMNS = 120  # of C++; ruff counts those of Python
SOURCES = {".py", ".cpp", ".cu", ".h", ".md", ".png"}

# Words of earlier versions that say nothing to a new reader: pattern, folders, what to write.
RETIRED_WORDS = (
    (r"\bseams?\b", ("longvq_layers", "csrc", "tests"), "slot"),
    (r"\bbehind\b", ("longvq_layers", "csrc"), "after"),
    (r"\b_?settle", ("longvq_layers", "csrc", "tests"), "install_and_verify, detect_… or sync_…"),
    (r"\bstands?_in\b", ("longvq_layers", "csrc", "tests"), "register_on, is_active_on"),
    (r"\bNoteCall\b", ("longvq_layers", "csrc", "tests"), "ContextHook"),
)


@cache
def modules() -> dict[str, Path]:
    """The files of the package by their names in imports; `__init__.py` has the name of its folder."""
    files = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


@cache
def syntax(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text())


@cache
def imports() -> dict[str, dict[str, int]]:
    """For each file the files that it imports, with a line; imports inside functions count, those for types don't."""
    return {module: dict(_imported(module)) for module in modules()}


def _imported(module: str) -> Iterator[tuple[str, int]]:
    for node in _statements(syntax(module)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            package = module if modules()[module].name == "__init__.py" else module.rpartition(".")[0]
            start = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (start, node.module) if part)
            names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules() else base for alias in node.names]
        for name in names:
            if name in modules() and name != module:
                yield name, node.lineno


def _statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from _statements(other)
        else:
            yield from _statements(child)


def place(module: str) -> str:
    return str(modules()[module].relative_to(ROOT))


def upward(levels: tuple[tuple[str, ...], ...], package: str) -> list[str]:
    """The imports between files of `package` that go against the table, and files that are missing in it."""
    level_of = {name: number for number, level in enumerate(levels) for name in level}
    own = package.rpartition(".")[2]

    def part(module: str) -> str | None:
        if module == package:
            return own
        name = module.removeprefix(f"{package}.")
        fitting = [known for known in level_of if name == known or name.startswith(f"{known}.")]
        return max(fitting, key=len, default=None)

    wrong = []
    for module in modules():
        if module != package and not module.startswith(f"{package}."):
            continue
        if part(module) is None:
            wrong.append(f"{place(module)} is in no line of the table; add it there")
            continue
        for target, line in imports()[module].items():
            if target != package and not target.startswith(f"{package}."):
                continue
            here, there = part(module), part(target)
            if there is not None and here != there and level_of[there] >= level_of[here]:
                wrong.append(f"{place(module)}:{line} imports {target}: {here} may not import from {there}")
    return wrong


def listed(problems: list[str]) -> str:
    return "\n  ".join(["", *problems])


def test_no_import_circle():
    circle: list[str] = []
    try:
        TopologicalSorter(imports()).prepare()
    except CycleError as error:
        circle = error.args[1][::-1]  # each file imports the next one
    steps = [f"{place(a)}:{imports()[a][b]} imports {b}" for a, b in pairwise(circle)]
    assert not steps, "files import each other in a circle:" + listed(steps)


def test_imports_go_downwards():
    wrong = upward(LEVELS, PACKAGE)
    assert not wrong, "against LEVELS:" + listed(wrong)


def test_imports_inside_replace_go_downwards():
    wrong = upward(LEVELS_OF_REPLACE, f"{PACKAGE}.replace")
    assert not wrong, "against LEVELS_OF_REPLACE:" + listed(wrong)


def test_folders_hold_a_dozen_files():
    counts: dict[str, int] = {}
    for top in (PACKAGE, "csrc", "tests", "docs"):
        for path in (ROOT / top).rglob("*"):
            if path.suffix in SOURCES and path.name != "__init__.py":
                folder = str(path.parent.relative_to(ROOT))
                counts[folder] = counts.get(folder, 0) + 1
    full = {folder: count for folder, count in counts.items() if count > MOST_FILES}
    wrong = [f"{folder}: {n} files" for folder, n in full.items() if n > FULL_FOLDERS.get(folder, (0, ""))[0]]
    assert not wrong, f"folders with more than {MOST_FILES} files:" + listed(wrong)
    needless = FULL_FOLDERS.keys() - full.keys()
    assert not needless, f"FULL_FOLDERS lists folders that need no exception: {sorted(needless)}"


def sources(*folders: str, suffixes: tuple[str, ...] = (".py", ".cpp", ".cu", ".h")) -> Iterator[Path]:
    for folder in folders:
        yield from (path for path in sorted((ROOT / folder).rglob("*")) if path.suffix in suffixes)


def test_files_are_short():
    lengths = {path: len(path.read_text().splitlines()) for path in sources(PACKAGE, "csrc")}
    wrong = [f"{path.relative_to(ROOT)}: {n} lines" for path, n in lengths.items() if n > MOST_LINES]
    assert not wrong, f"files of more than {MOST_LINES} lines:" + listed(wrong)


def test_lines_of_cpp_are_short():
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {len(line)} columns"
        for path in sources("csrc", suffixes=(".cpp", ".cu", ".h"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > MOST_COLUMNS
    ]
    assert not wrong, f"lines of more than {MOST_COLUMNS} columns:" + listed(wrong)


def test_files_say_what_they_are_for():
    silent = [place(name) for name in modules() if syntax(name).body and ast.get_docstring(syntax(name)) is None]
    assert not silent, "modules without a docstring:" + listed(silent)


def test_public_names_have_docstrings():
    silent = [f"{package}.{name}: {where}" for package in PUBLIC for name, where in _undocumented(package)]
    assert not silent, "public names without a docstring:" + listed(silent)


def _undocumented(package: str) -> Iterator[tuple[str, str]]:
    module = ".".join(part for part in (PACKAGE, package) if part)
    exported = [
        ast.literal_eval(node.value)
        for node in syntax(module).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    assert exported, f"{place(module)} has no __all__"
    for name in exported[0]:
        where, definition = _definition(module, name)
        documented = isinstance(definition, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and ast.get_docstring(definition) is None:
            yield name, f"{place(where)}:{getattr(definition, 'lineno', 1)}"


def _definition(module: str, name: str) -> tuple[str, ast.AST]:
    """The file and the class, function, assignment or module that a name of `module` stands for."""
    if f"{module}.{name}" in modules():
        return f"{module}.{name}", syntax(f"{module}.{name}")
    for node in syntax(module).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return module, node
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(ast.unparse(target) == name for target in targets):
                return module, node
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _definition(node.module, alias.name)
    raise AssertionError(f"{place(module)} exports {name!r}, which it neither defines nor imports")


def test_retired_words_stay_away():
    wrong = []
    for pattern, folders, better in RETIRED_WORDS:
        for path in sources(*folders):
            text = "" if path == Path(__file__) else path.read_text()
            if found := list(re.finditer(pattern, text)):
                line = text.count("\n", 0, found[0].start()) + 1
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {found[0][0]!r}, {len(found)} times; write {better}")
    assert not wrong, "retired words:" + listed(wrong)
