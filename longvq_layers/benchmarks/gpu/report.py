"""The report of a run on a GPU: sections that are on disk as soon as they are known."""

import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path


class Report:
    """Writes gpu.md and prints the same lines.

    Args:
        folder: made if it does not exist.
        budget: seconds; sections that would begin later are left out.
    """

    def __init__(self, folder: Path, budget: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.budget, self.start = folder / "gpu.md", budget, time.monotonic()
        self.failed: list[str] = []
        self.path.write_text("")

    def add(self, text: str) -> None:
        print(text, flush=True)
        with self.path.open("a") as file:
            file.write(text + "\n")

    def part(self, title: str, lines: Callable[[], Iterable[str]]) -> None:
        """A section. An error in it is reported, and the run continues."""
        self.add(f"\n## {title}\n")
        started = time.monotonic()
        try:
            if started - self.start > self.budget:
                raise TimeoutError(f"left out: {started - self.start:.0f} s of {self.budget:.0f} are over")
            for line in lines():
                self.add(line)
        except Exception as error:
            self.failed.append(title)
            self.add(f"FAILED: {type(error).__name__}: {error}\n\n```\n{traceback.format_exc()[-1500:]}```")
        self.add(f"\n({time.monotonic() - started:.1f} s)")

    def finish(self) -> None:
        """Exits with an error if a section failed."""
        self.add(f"\nWritten: {self.path}")
        if self.failed:
            sys.exit(f"failed: {', '.join(self.failed)}")
