"""The measurements of the benchmark of attention, and how to find one."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import isnan, nan

from longvq_layers.benchmarks.attention.problem import Sizes

PEERS = {  # case -> the method that ours is compared with
    "forward": "sdpa",
    "forward + backward": "sdpa",
    "assign": "matmul + argmax",
    "bfloat16": "ours in float32",
}


@dataclass(frozen=True)
class Row:
    """One measurement; NaN and None stand for what was not measured. Rates of ours count the work of `work.py`."""

    case: str
    form: str
    L: int
    method: str
    seconds: float = nan  # median of one call; of one token for "decode"
    rounds: int | None = None
    gflops: float = nan
    gbytes: float = nan
    extra_bytes: int | None = None
    served: str = ""  # the backend that computed it
    note: str = ""

    @property
    def timed(self) -> bool:
        return not isnan(self.seconds)


def find(rows: Iterable[Row], case: str, form: str, length: int, method: str = "ours") -> Row | None:
    wanted = case, form, length, method
    return next((r for r in rows if (r.case, r.form, r.L, r.method) == wanted), None)


def beside(rows: Iterable[Row], ours: Row, method: str) -> Row:
    """The row of a method that was timed in the same rounds as ours.

    Raises:
        LookupError: there is none.
    """
    found = find(rows, ours.case, ours.form, ours.L, method)
    if found is None:
        raise LookupError(f"{ours.case}, {ours.form}, L = {ours.L} has no row of {method!r}")
    return found


def peer_of(rows: Iterable[Row], ours: Row) -> Row | None:
    """The peer's row, if it was timed."""
    peer = find(rows, ours.case, ours.form, ours.L, PEERS[ours.case])
    return peer if peer is not None and peer.timed else None


def by_length(rows: Iterable[Row], form: str, method: str) -> list[Row]:
    """The rows of "forward" in which a method was timed, by length."""
    found = [r for r in rows if (r.case, r.form, r.method) == ("forward", form, method) and r.timed]
    return sorted(found, key=lambda row: row.L)


def decoded(rows: Iterable[Row], method: str = "ours") -> list[Row]:
    return [row for row in rows if (row.case, row.method) == ("decode", method)]


def memory_multiple(extra_bytes: int, length: int, sizes: Sizes) -> float:
    """Extra memory over the bytes of v."""
    return extra_bytes / (4 * sizes.num_heads * length * sizes.head_dim)
