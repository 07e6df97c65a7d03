"""docs/health.md: its Python runs, and it lists every kind of finding."""

import contextlib
import io
import re
from pathlib import Path

import longvq_layers.health

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "health.md").read_text()


def test_the_program_runs():
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(re.search(r"```python\n(.*?)```", TEXT, re.DOTALL).group(1), {})
    assert "healthy" in printed.getvalue() and "feed-forward" in printed.getvalue()


def test_every_kind_of_finding_is_documented():
    sources = Path(longvq_layers.health.__file__).parent.glob("rules/*.py")
    kinds = {
        kind for source in sources for kind in re.findall(r'Finding\(\s*(?:"\w+"|\w+),\s*"(\w+)"', source.read_text())
    }
    table = TEXT.partition("## Findings")[2].partition("A finding has")[0]
    listed = set()
    for names in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE):
        first, *others = re.findall(r"`(\w+)`", names)
        stem = first.rpartition("_")[0]
        listed |= {first, *(stem + name if name.startswith("_") else name for name in others)}
    assert len(kinds) > 8 and kinds <= listed, kinds - listed
