"""The targets of the scan, and whether a run met them."""

from collections.abc import Iterator

from longvq_layers.benchmarks.common.memory import NOT_READABLE
from longvq_layers.benchmarks.common.results import met
from longvq_layers.benchmarks.ssm.rows import TIMED, Row, find

# (case, length) -> least speed-up over a peer
SPEED_TARGETS = {
    ("forward", 4096): {"vandermonde": 100, "fft": 4},
    ("forward", 16384): {"vandermonde": 200, "fft": 8},
    ("forward + backward", 4096): {"vandermonde": 40, "fft": 3},
}
STEP_TARGET = 50e-6  # seconds a token, at most
SCALING_TARGET = 1.3  # longest over shortest time per element, at most
MEMORY_TARGET = 3.0  # times the bytes of u, at most


def targets(rows: list[Row]) -> Iterator[tuple[str, str, str, str]]:
    """Lines (what, asked, measured, met or not); the growth of memory has no target."""
    for ours in (r for r in rows if r.case in TIMED and r.method == "ours"):
        for peer, least in SPEED_TARGETS.get((ours.case, ours.L), {}).items():
            other = find(rows, ours.case, ours.L, peer)
            label = f"{ours.case}, L = {ours.L}, against {peer}"
            if other is None or not other.timed:
                yield label, f"≥ {least}x", "skipped", "not measured"
            else:
                factor = other.seconds / ours.seconds
                yield label, f"≥ {least}x", f"{factor:.1f}x", met(factor >= least)
    if step := find(rows, "step"):
        label = f"step, H = {step.H}, one token"
        yield label, f"< {STEP_TARGET * 1e6:.0f} µs", f"{step.seconds * 1e6:.1f} µs", met(step.seconds < STEP_TARGET)
    if growth := find(rows, "step memory"):
        measured = NOT_READABLE if growth.extra_bytes is None else f"{growth.extra_bytes / 1024:.0f} KiB"
        yield f"growth of resident memory over {growth.L:,} tokens", "", measured, ""
    if scaling := [r for r in rows if r.case == "scaling"]:
        times = [row.per_element for row in scaling]
        ratio = max(times) / min(times)
        label = f"forward time per element, L = {scaling[0].L:,} to {scaling[-1].L:,}, max / min"
        yield label, f"≤ {SCALING_TARGET}x", f"{ratio:.2f}x", met(ratio <= SCALING_TARGET)
    for row in (r for r in rows if r.case == "memory"):
        label = f"extra memory of forward + backward, B = {row.B}, L = {row.L}, over the bytes of u"
        asked = f"≤ {MEMORY_TARGET:g}x"
        if row.extra_bytes is None:
            yield label, asked, NOT_READABLE, "not measured"
        else:
            multiple = row.extra_bytes / (4 * row.B * row.H * row.L)
            yield label, asked, f"{multiple:.2f}x", met(multiple <= MEMORY_TARGET)
