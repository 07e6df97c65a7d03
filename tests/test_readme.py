"""The README is true: its Python runs, CI runs its commands, and the links of all pages lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_python_of_the_page_on_replacing_runs(tmp_path):
    program = tmp_path / "replace.py"
    program.write_text("\n".join(blocks("python", (ROOT / "docs" / "replace.md").read_text())))
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "MyAttention" in done.stdout


@pytest.mark.long
def test_python_blocks_run(tmp_path):
    program = tmp_path / "readme.py"
    program.write_text("\n".join(blocks("python")))
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "256" in done.stdout  # the report's table


def test_every_command_is_run_somewhere():
    """Each shell line stands in CI; the installation itself is tested in test_packaging."""
    ci = (ROOT / ".ci" / "run").read_text()
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines() if line.strip()]
    assert lines
    for line in lines:
        known = line == "pip install ." or line in ci or line.removeprefix("python ") in ci
        assert known, f"README shows a command that nothing runs: {line}"


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_linked_files_exist(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_linked_headings_exist(page):
    for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", page.read_text()):
        text = (page.parent / target).read_text() if target else page.read_text()
        assert heading in [anchor(title) for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)], heading


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_named_files_exist(page):
    """Files and folders in backticks, from the root or from the folder that the text is about."""
    folders = ("longvq_layers", "csrc", "tests", "docs", ".ci", ".github")
    paths = [path for folder in folders for path in (ROOT / folder, *(ROOT / folder).rglob("*"))]
    known = [f"/{path.relative_to(ROOT)}{'/' if path.is_dir() else ''}" for path in (*paths, *ROOT.glob("*.*"))]
    named = re.findall(r"`([\w./-]+(?:/|\.(?:py|cpp|cu|h|md|png)))`", page.read_text())
    missing = [name for name in named if not any(path.endswith(f"/{name}") for path in known)]
    assert not missing, missing


def anchor(title: str) -> str:
    """The name that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
