"""The Python in docs/models.md and in the docstrings of the models runs."""

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import longvq_layers.models

ROOT = Path(__file__).resolve().parents[2]


def test_the_snippets_run():
    program = "\n".join(re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "models.md").read_text(), re.M | re.S))
    assert program.count("import") > 5
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([2, 60])" in done.stdout and "LongVQCache(batch_size=1, positions=97" in done.stdout


def test_the_examples_of_the_docstrings_run():
    names = [m.name for m in pkgutil.walk_packages(longvq_layers.models.__path__, "longvq_layers.models.")]
    results = [doctest.testmod(importlib.import_module(name)) for name in names]
    assert sum(result.failed for result in results) == 0 and sum(result.attempted for result in results) > 10
