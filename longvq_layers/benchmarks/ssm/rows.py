"""The measurements of the benchmark of the scan, the work that the scan needs, and how to find a measurement."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import isnan, nan

from longvq_layers.benchmarks.ssm.peers import MODES

TIMED = ("forward", "forward + backward")
PEERS = ("vandermonde", "fft", "torch", "copy", "clone")

# Multiply-adds of the plain recurrence per channel, step and complex mode. Forward: λx + u takes 4, Re(w x) takes 2.
# Backward: the states again (4: keeping them would take 2N times the memory of u), their gradients λβ + w·dy (6),
# du (1), dw (2) and dλ (4).
_MULTIPLY_ADDS = {"forward": 6, "step": 6, "scaling": 6, "forward + backward": 6 + 17}
# Arrays of the size of u that must be read or written at least: u, y; u, y, dy, du.
ARRAYS = {"forward": 2, "scaling": 2, "forward + backward": 4}


@dataclass(frozen=True)
class Row:
    """One measurement; NaN and None stand for what was not measured.

    Rates are GFLOP/s and GB/s of the plain recurrence, whatever the method itself computes.
    """

    case: str
    B: int
    H: int
    L: int
    method: str
    seconds: float = nan  # median of one call; of one token for "step"
    rounds: int | None = None
    gflops: float = nan
    gbytes: float = nan
    difference: float = nan  # from ours, relative to the largest value
    extra_bytes: int | None = None
    note: str = ""

    @property
    def timed(self) -> bool:
        return not isnan(self.seconds)

    @property
    def per_element(self) -> float:
        """Seconds per element of u."""
        return self.seconds / (self.B * self.H * self.L)


def work(case: str, batch: int, channels: int, length: int) -> tuple[float, float]:
    """Floating point operations and bytes that the plain recurrence needs."""
    elements = batch * channels * length
    flops = 2.0 * _MULTIPLY_ADDS[case] * elements * MODES
    # A step reads decay, weight and state and writes the state, all complex64.
    return flops, 4.0 * 8 * elements * MODES if case == "step" else 4.0 * ARRAYS[case] * elements


def find(rows: Iterable[Row], case: str, length: int | None = None, method: str = "ours") -> Row | None:
    return next((r for r in rows if r.case == case and r.method == method and length in (None, r.L)), None)


def beside(rows: Iterable[Row], ours: Row, method: str) -> Row:
    """The row of a method that was timed in the same rounds as ours.

    Raises:
        LookupError: there is none.
    """
    found = find(rows, ours.case, ours.L, method)
    if found is None:
        raise LookupError(f"{ours.case}, L = {ours.L} has no row of {method!r}")
    return found
